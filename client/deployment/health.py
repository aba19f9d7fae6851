"""Ask a worker whether it is serving. Loads little, as a container's health check starts this every minute."""

from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "fedlora.client.v1.Worker"


def is_serving(socket: Path) -> bool:
    """Does the health service of the worker at this socket say that it is serving?"""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
