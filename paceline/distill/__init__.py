"""`paceline distill`: a small draft made for one target, from text the target wrote itself."""
