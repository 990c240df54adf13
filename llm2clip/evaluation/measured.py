"""What the retrieval benchmark knows of one kind of captions of one data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llm2clip.evaluation.datasets import CaptionSet, ImageReader, RetrievalData
from llm2clip.evaluation.features import Centred, Features, Joined, Rows, UnitRows
from llm2clip.evaluation.ranking import Directions, Pairing
from llm2clip.evaluation.ranks import Ranks

Direction = Literal["image → text", "text → image"]
DIRECTIONS: tuple[Direction, ...] = ("image → text", "text → image")


@dataclass
class Measured:
    """One kind of captions of one data set, measured with every model.

    Attributes:
        data: the data set.
        captions: the captions.
        pairing: what is ranked; None before the first model.
        texts: model -> features of the captions.
        images: model -> features of the images.
        ranks: model -> ranks.
        strangers: more images of the gallery, which belong to no caption; None: there are none.
        of_strangers: model -> their features.
        centred: captions and images are ranked less their means.
    """

    data: RetrievalData
    captions: CaptionSet
    pairing: Pairing | None = None
    texts: dict[str, Features] = field(default_factory=dict)
    images: dict[str, Features] = field(default_factory=dict)
    ranks: dict[str, Directions] = field(default_factory=dict)
    strangers: ImageReader | None = None
    of_strangers: dict[str, UnitRows] = field(default_factory=dict)
    centred: bool = False

    @property
    def title(self) -> str:
        """Name in the tables."""
        kind = self.captions.kind
        title = self.data.title if kind == "captions" else f"{self.data.title}, {kind}"
        return f"{title}, centred" if self.centred else title

    def queries(self, label: str) -> Rows:
        """Features of the captions that are ranked."""
        assert self.pairing is not None
        rows = self.texts[label].rows(self.pairing.text_rows)
        return Centred(rows) if self.centred else rows

    def gallery(self, label: str) -> Rows:
        """Features of the images that are ranked, the strangers last."""
        assert self.pairing is not None
        own = self.images[label].rows(self.pairing.image_rows)
        rows = Joined(own, self.of_strangers[label]) if label in self.of_strangers else own
        return Centred(rows) if self.centred else rows

    def of(self, direction: Direction) -> dict[str, Ranks]:
        """Model -> ranks in one direction."""
        return {
            label: both.text_to_image if direction == "text → image" else both.image_to_text
            for label, both in self.ranks.items()
        }
