"""The JSON of the contract, for the OpenAPI page and for tests."""

from pydantic import BaseModel, Field

from app.model import card


class ModelName(BaseModel):
    name: str
    version: str = Field(description="first 8 digits of the weights file's SHA-256")


class Top(BaseModel):
    label: str
    probability: float = Field(ge=0, le=1)


class FileError(BaseModel):
    type: str
    title: str
    detail: str


class Prediction(BaseModel):
    """One classified file."""

    filename: str | None = Field(description="as uploaded; null for a raw body")
    label: str
    confidence: float = Field(ge=0, le=1, description="probability of the label")
    top: list[Top]
    ood_score: float | None = Field(
        None, ge=0, le=1, description="share of validation images that resemble the training images more; may be absent"
    )
    ood: bool | None = Field(None, description="whether ood_score is above 0.95; absent without it")
    resized_from: tuple[int, int] | None = Field(description="[width, height] where it was not the model's input size")


class Failure(BaseModel):
    """One file among others that could not be classified."""

    filename: str | None
    error: FileError


class Predictions(BaseModel):
    model: ModelName
    predictions: list[Prediction | Failure] = Field(description="in the order of the uploaded files")


class Problem(BaseModel):
    """RFC 9457, served as application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class Agreement(BaseModel):
    images: int
    agreement: float | None = Field(description="share of the images that both models label alike; null without any")


class ShadowCard(Agreement):
    """The candidate that runs on a sample of the traffic, since it was loaded, in the process that responds."""

    name: str
    version: str
    sample: float = Field(description="share of requests")
    classes: dict[str, Agreement] = Field(description="by the label of the model that serves")
    ms_per_image: float | None = Field(description="on one low-priority thread, with decoding for another input size")


class ModelCard(card.ModelCard):
    """The weights' card and how they are served."""

    version: str = Field(description="first 8 digits of the weights file's SHA-256")
    sha256: str
    engine: str
    device: str
    precision: str
    shadow: ShadowCard | None = Field(None, description="of SHADOW_WEIGHTS")


class Health(BaseModel):
    status: str
