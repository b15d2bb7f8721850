"""Our engine as a worker of NVIDIA Dynamo, which routes over many machines; nothing else here needs Dynamo."""
