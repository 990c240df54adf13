"""Our models in MTEB and MIEB: `mteb.evaluate(MTEBModel(...), tasks)` (mteb 2).

A caption encoder alone is a text model; together with the CLIP model it is one of texts and images.
"""

from __future__ import annotations

from typing import Any

import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from torch import Tensor

from llm2clip.evaluation.joint_encoder import JointEncoder
from llm2clip.models import CaptionEncoder

_CITATION = """@misc{huang2024llm2clip,
  title={LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation},
  author={Weiquan Huang and others},
  year={2024},
  eprint={2411.04997},
  archivePrefix={arXiv}
}"""
# some corpora have empty texts, of which a caption encoder has no embedding
_NOTHING = "."


class MTEBModel(AbsEncoder):
    """A caption encoder, or the CLIP model with it, under MTEB's encoder protocol.

    Texts go in as they are: instructions that MTEB has for a task are not put before them, since the encoder has a
    prompt of its own. An empty text is embedded as a full stop. An item with text and image gets the sum of both
    features, as MTEB's other CLIP models do it.

    Args:
        encoder: a `CaptionEncoder` for texts alone, a `JointEncoder` for texts and images.
        name: under which the results are kept, "organisation/model".
        revision: tells results of one name apart.

    Examples:
        >>> import mteb
        >>> model = MTEBModel(JointEncoder.from_pretrained("runs/clip/result", "models/llama"), "me/llm2clip")
        >>> mteb.evaluate(model, mteb.get_tasks(["Flickr30kT2IRetrieval"]))
    """

    def __init__(self, encoder: CaptionEncoder | JointEncoder, name: str, revision: str = "1") -> None:
        self.encoder = encoder
        joint = isinstance(encoder, JointEncoder)
        captions = encoder.captions if isinstance(encoder, JointEncoder) else encoder
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "n_parameters": sum(p.numel() for p in encoder.parameters()),
                "max_tokens": captions.max_length,
                "embed_dim": encoder.model.settings.embed_dim
                if isinstance(encoder, JointEncoder)
                else encoder.dim,
                "framework": ["PyTorch"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": False,
                "modalities": ["image", "text"] if joint else ["text"],
                "citation": _CITATION,
            }
        )

    def encode(self, inputs: Any, **kwargs: Any) -> Tensor:
        """
        Args:
            inputs: a data loader of batches with "text", "image" or both.
            kwargs: MTEB's task and batch settings; not used.

        Returns:
            (n, D) unit embeddings, fp32 on the CPU.
        """
        parts = [self._batch(batch) for batch in inputs]
        return torch.cat(parts)

    def _batch(self, batch: dict[str, Any]) -> Tensor:
        features = []
        if batch.get("text") is not None:
            features.append(self._texts([text if text.strip() else _NOTHING for text in batch["text"]]))
        if batch.get("image") is not None:
            if not isinstance(self.encoder, JointEncoder):
                raise ValueError(
                    "images need the CLIP model too: MTEBModel(JointEncoder(model, encoder), name)"
                )
            features.append(self.encoder.encode_images(batch["image"]))
        if not features:
            raise ValueError(f"a batch needs text or image, this one has {sorted(batch)}")
        return torch.nn.functional.normalize(torch.stack(features).sum(0), dim=-1)

    def _texts(self, texts: list[str]) -> Tensor:
        if isinstance(self.encoder, JointEncoder):
            return self.encoder.encode_texts(texts)
        return self.encoder.encode(texts, normalize=True)


__all__ = ["MTEBModel"]
