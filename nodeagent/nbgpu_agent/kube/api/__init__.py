"""The kubelet's gRPC interfaces: `*.proto` are written by hand, `*_pb2.py` generated (README.md here)."""
