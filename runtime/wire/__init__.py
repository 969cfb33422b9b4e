"""Sans-io protocol: messages, codec, and who may say what when."""
