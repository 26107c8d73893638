"""EMQX's ExHook: the gRPC server, the hooks to register, and the events made of its calls."""
