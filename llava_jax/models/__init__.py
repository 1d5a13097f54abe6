"""The model: CLIP ViT, projector, LLaMA, and LLaVA, which joins the three."""
