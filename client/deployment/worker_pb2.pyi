from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    WHO: _ClassVar[Kind]
    SECURE: _ClassVar[Kind]
    TRAIN: _ClassVar[Kind]
    EVALUATE: _ClassVar[Kind]
KIND_UNSPECIFIED: Kind
WHO: Kind
SECURE: Kind
TRAIN: Kind
EVALUATE: Kind

class Task(_message.Message):
    __slots__ = ("kind", "run", "head", "numbers")
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    kind: Kind
    run: str
    head: str
    numbers: Numbers
    def __init__(self, kind: _Optional[_Union[Kind, str]] = ..., run: _Optional[str] = ..., head: _Optional[str] = ..., numbers: _Optional[_Union[Numbers, _Mapping]] = ...) -> None: ...

class Numbers(_message.Message):
    __slots__ = ("dtype", "shape", "bytes")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    bytes: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., bytes: _Optional[int] = ...) -> None: ...

class TaskPiece(_message.Message):
    __slots__ = ("task", "chunk")
    TASK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    task: Task
    chunk: bytes
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("run", "head", "numbers")
    RUN_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    run: str
    head: str
    numbers: Numbers
    def __init__(self, run: _Optional[str] = ..., head: _Optional[str] = ..., numbers: _Optional[_Union[Numbers, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class AnswerPiece(_message.Message):
    __slots__ = ("answer", "chunk", "failed")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    answer: Answer
    chunk: bytes
    failed: Failed
    def __init__(self, answer: _Optional[_Union[Answer, _Mapping]] = ..., chunk: _Optional[bytes] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...
