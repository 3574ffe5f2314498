"""The JSON of an inference request, as strict as the protocol: no number is taken from a string, nor a flag from 1."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

Size = Annotated[int, Field(ge=0)]
Few = Field(max_length=64)  # what is more is refused before it costs time and memory
LARGEST = 2**63 - 1  # the protocol's numbers are of 64 bits


class Part(BaseModel):
    model_config = ConfigDict(strict=True)


class InputParameters(Part):
    binary_data_size: Size | None = None
    shared_memory_region: Any = None


class Input(Part):
    name: str
    datatype: str
    shape: Annotated[list[Size], FailFast(), Few]
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(Part):
    binary_data: bool | None = None
    classification: Size = 0
    shared_memory_region: Any = None


class Output(Part):
    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(Part):
    binary_data_output: bool = False
    timeout: int = Field(0, ge=0, le=LARGEST, description="microseconds; 0 is the service's own limit")


class InferenceRequest(Part):
    id: str | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[Input], FailFast(), Few]
    outputs: Annotated[list[Output], FailFast(), Few] = []
