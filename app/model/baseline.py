"""Histograms of the served model's outputs for held-out images: what the monitoring of drift compares with."""

from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Edge = Annotated[float, Field(allow_inf_nan=False)]


class Histogram(BaseModel):
    """Shares of the images below the first edge, between each two edges, and from the last edge on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edges: Annotated[list[Edge], Field(min_length=1, max_length=100)]
    shares: Annotated[list[Share], Field(min_length=2, max_length=101)]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.shares) != len(self.edges) + 1:
            raise ValueError("a histogram has one share more than edges")
        if sorted(set(self.edges)) != self.edges:
            raise ValueError("the edges of a histogram must increase")
        return self


class Baseline(BaseModel):
    """Of held-out images: top probability, out-of-distribution score, brightness, and share of each predicted class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Annotated[int, Field(gt=0)]
    confidence: Histogram
    brightness: Annotated[Histogram, Field(description="of the mean of all channels, 0 to 255")]
    ood_score: Histogram | None = None
    classes: Annotated[list[Share], Field(min_length=2, max_length=10_000)]


def brightness(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean over every thirteenth value, 0 to 255, of images uint8 [N, S, S, 3]: float64 [N].

    Thirteen has no factor in common with three: the sample has as many values of each channel. All values take five
    times as long, which shows in the latency of a single image.
    """
    sample = images.reshape(len(images), -1)[:, ::13]
    means: NDArray[np.float64] = sample.sum(1, dtype=np.uint32) / sample.shape[1]
    return means
