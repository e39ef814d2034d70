"""`tf.train.Example`, what a record of tensorflow-datasets holds, without its packages.

The message is described here as far as it is read and written: features of bytes and of whole
numbers. Others, of floats, are passed over.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

_FILE = """
name: "bigbatch/example.proto"
package: "bigbatch"
syntax: "proto3"
message_type {
  name: "BytesList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
}
message_type {
  name: "Int64List"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
}
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 oneof_index: 0 type_name: "BytesList" }
  field { name: "int64_list" number: 3 oneof_index: 0 type_name: "Int64List" }
  oneof_decl { name: "kind" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type_name: "FeatureEntry" }
  nested_type {
    name: "FeatureEntry"
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 type_name: "Feature" }
    options { map_entry: true }
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 type_name: "Features" }
}
"""


def _message() -> Any:
    file = text_format.Parse(_FILE, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bigbatch.Example"))


Example = _message()
"""The class of the message; `Example.FromString` raises google.protobuf's DecodeError."""
