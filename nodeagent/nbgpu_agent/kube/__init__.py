"""The agent on Kubernetes: the DRA driver ``gpu.nbgpu.io``. Imported only with ``--kubernetes``: it brings gRPC and a Kubernetes client."""
