"""Training of the face adapter: `python -m train --config train/phases/phase_1.yaml` (see train/README.md).

A sample's way: `shards` (bytes to a checked record), `catalogue` and `data` (which records, in which order)
or `entries` and `stream` (the same for shards read in sequence), `references` (whose photo), `examples`
(crops, boxes, batches), `step` (the loss of a batch, with `frozen` and `losses`). `trainer` runs it, with
`optim`, `checkpoints`, `runlog` and `validation`. Around it: `own_data`, `stylise`, `memory`, `release`,
`reproduce`.
"""
