import withanyone.adapter  # noqa: F401
import withanyone.faces  # noqa: F401
import withanyone.mini.latents  # noqa: F401
import withanyone.mini.scheduler  # noqa: F401
from withanyone.pipeline import WithAnyonePipeline  # noqa: F401
