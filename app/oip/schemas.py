"""The JSON of an inference request, as strict as the protocol: no coercion of strings to numbers or of 1 to true."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

NonNegative = Annotated[int, Field(ge=0)]
MaxItems64 = Field(max_length=64)  # bounds time and memory
LARGEST = 2**63 - 1  # the protocol's numbers are of 64 bits


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True)


class InputParameters(StrictModel):
    binary_data_size: NonNegative | None = None
    shared_memory_region: Any = None


class Input(StrictModel):
    name: str
    datatype: str
    shape: Annotated[list[NonNegative], FailFast(), MaxItems64]
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(StrictModel):
    binary_data: bool | None = None
    classification: NonNegative = 0
    shared_memory_region: Any = None


class Output(StrictModel):
    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(StrictModel):
    binary_data_output: bool = False
    timeout: int = Field(0, ge=0, le=LARGEST, description="microseconds; 0 is the service's own limit")


class InferenceRequest(StrictModel):
    id: str | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[Input], FailFast(), MaxItems64]
    outputs: Annotated[list[Output], FailFast(), MaxItems64] = []


class LoadParameters(StrictModel):
    """Triton's own parameters send a configuration or files, which would be code of the caller's choice."""

    model_config = ConfigDict(strict=True, extra="forbid")

    version: str | None = Field(None, description="of the weights that shall serve: the file's, or the shadow's")


class LoadRequest(StrictModel):
    parameters: LoadParameters = LoadParameters()
