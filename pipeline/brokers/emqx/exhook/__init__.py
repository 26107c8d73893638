"""EMQX's ExHook: the gRPC server, the hooks that it registers, and the events that it makes from calls."""
