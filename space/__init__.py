"""The page of the Space: visitors, the studio that makes pictures, the parts of the page and its words."""
