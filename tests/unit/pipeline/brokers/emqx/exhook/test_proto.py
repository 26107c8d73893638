"""The ExHook service: its numbers are those of EMQX, and the generated modules match the .proto."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb

ROOT = Path(__file__).parents[6]
PROTO = "millpond/pipeline/brokers/emqx/exhook/exhook.proto"
EMPTY, VALUED = "EmptySuccess", "ValuedResponse"

# As EMQX documents them.
RPCS = {
    "OnProviderLoaded": ("broker=1 meta=2", "LoadedResponse"),
    "OnProviderUnloaded": ("meta=1", EMPTY),
    "OnClientConnect": ("conninfo=1 props=2 meta=3 user_props=4", EMPTY),
    "OnClientConnack": ("conninfo=1 result_code=2 props=3 meta=4 user_props=5", EMPTY),
    "OnClientConnected": ("clientinfo=1 meta=2", EMPTY),
    "OnClientDisconnected": ("clientinfo=1 reason=2 meta=3", EMPTY),
    "OnClientAuthenticate": ("clientinfo=1 result=2 meta=3", VALUED),
    "OnClientAuthorize": ("clientinfo=1 type=2 topic=3 result=4 meta=5", VALUED),
    "OnClientSubscribe": ("clientinfo=1 props=2 topic_filters=3 meta=4 user_props=5", EMPTY),
    "OnClientUnsubscribe": ("clientinfo=1 props=2 topic_filters=3 meta=4 user_props=5", EMPTY),
    "OnSessionCreated": ("clientinfo=1 meta=2", EMPTY),
    "OnSessionSubscribed": ("clientinfo=1 topic=2 subopts=3 meta=4", EMPTY),
    "OnSessionUnsubscribed": ("clientinfo=1 topic=2 meta=3", EMPTY),
    "OnSessionResumed": ("clientinfo=1 meta=2", EMPTY),
    "OnSessionDiscarded": ("clientinfo=1 meta=2", EMPTY),
    "OnSessionTakenover": ("clientinfo=1 meta=2", EMPTY),
    "OnSessionTerminated": ("clientinfo=1 reason=2 meta=3", EMPTY),
    "OnMessagePublish": ("message=1 meta=2 props=3 user_props=4", VALUED),
    "OnMessageDelivered": ("clientinfo=1 message=2 meta=3", EMPTY),
    "OnMessageDropped": ("message=1 reason=2 meta=3", EMPTY),
    "OnMessageAcked": ("clientinfo=1 message=2 meta=3", EMPTY),
}
MESSAGES = {
    "LoadedResponse": "hooks=1",
    "HookSpec": "name=1 topics=2",
    "ValuedResponse": "type=1 bool_result=3 message=4",
    "BrokerInfo": "version=1 sysdescr=2 uptime=3 datetime=4",
    "ConnInfo": "node=1 clientid=2 username=3 peerhost=4 sockport=5 proto_name=6 proto_ver=7 keepalive=8 peerport=9",
    "ClientInfo": (
        "node=1 clientid=2 username=3 password=4 peerhost=5 sockport=6 protocol=7 mountpoint=8 is_superuser=9 "
        "anonymous=10 cn=11 dn=12 peerport=13"
    ),
    "Message": "node=1 id=2 qos=3 from=4 topic=5 payload=6 timestamp=7 headers=8",
    "Property": "name=1 value=2",
    "TopicFilter": "name=1 subopts=3",
    "SubOpts": "qos=1 share=2 rh=3 rap=4 nl=5",
    "RequestMeta": "node=1 version=2 sysdescr=3 cluster_name=4",
}


def numbers(message: str) -> str:
    fields = pb.DESCRIPTOR.message_types_by_name[message].fields
    return " ".join(
        f"{'from' if field.name == 'from_client_id' else field.name}={field.number}"
        for field in fields
    )


def test_the_service_has_exactly_the_documented_calls() -> None:
    service = pb.DESCRIPTOR.services_by_name["HookProvider"]
    assert service.full_name == "emqx.exhook.v3.HookProvider"
    assert {
        method.name: (numbers(method.input_type.name), method.output_type.name)
        for method in service.methods
    } == RPCS


@pytest.mark.parametrize("message", MESSAGES)
def test_field_numbers_are_those_of_emqx(message: str) -> None:
    assert numbers(message) == MESSAGES[message]


def test_answer_types_are_numbered_as_in_emqx() -> None:
    kinds = pb.ValuedResponse.ResponsedType
    assert kinds.items() == [("CONTINUE", 0), ("IGNORE", 1), ("STOP_AND_RETURN", 2)]


def test_the_generated_modules_match_the_proto(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}", PROTO,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for suffix in ("py", "pyi"):
        name = PROTO.replace(".proto", f"_pb2.{suffix}")
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), (
            f"{name} is not what protoc makes of {PROTO}"
        )
