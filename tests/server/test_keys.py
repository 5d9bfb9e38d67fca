"""A file of keys in, names or every problem out; and the door that asks for one."""

from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from chatterbox_server.keys import OPEN, Keys, KeysError, RequireKey
from server.fakes import run

ANNA = "sk-anna-0123456789"
BOB = "sk-bob-0123456789#x"


def a_file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "api-keys"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_each_key_belongs_to_its_name(tmp_path: Path) -> None:
    keys = Keys(a_file(tmp_path, f"# who speaks\n\nanna {ANNA}\n  bob\t{BOB}  \r\n"))

    assert keys.names == ("anna", "bob")
    assert keys.name_of(f"Bearer {ANNA}") == "anna"
    assert keys.name_of(f"Bearer {BOB}") == "bob"


def test_the_byte_order_mark_of_an_editor_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert Keys(a_file(tmp_path, f"\ufeffanna {ANNA}\n")).names == ("anna",)


@pytest.mark.parametrize("header", [f"bearer {ANNA}", f"BEARER {ANNA}", f"Bearer   {ANNA} "])
def test_the_scheme_may_be_spelt_as_anyone_likes(header: str, tmp_path: Path) -> None:
    assert Keys(a_file(tmp_path, f"anna {ANNA}")).name_of(header) == "anna"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        ANNA,
        f"Basic {ANNA}",
        f"Bearer{ANNA}",
        f"Bearer {ANNA[:-1]}",
        f"Bearer {ANNA}x",
        f"Bearer {ANNA.upper()}",
        f"Bearer anna {ANNA}",
        "Bearer \xff\udc80",
    ],
)
def test_anything_else_is_nobodys(header: str | None, tmp_path: Path) -> None:
    assert Keys(a_file(tmp_path, f"anna {ANNA}")).name_of(header) is None


def test_every_problem_is_told_at_once_by_its_line_and_without_a_word_of_the_file(tmp_path: Path) -> None:
    lines = [
        f"anna {ANNA}",
        "# a comment is a line of its own",
        "sk-only-a-key-0123456789",
        f"carl {BOB} # mine",
        "dora sk-short",
        f"{BOB * 4} erik",
        f"anna {BOB}",
        f"fred {ANNA}",
        "gina schlüssel-0123456789",
        f"hans {'k' * 257}",
    ]
    path = a_file(tmp_path, "\n".join(lines))

    with pytest.raises(KeysError) as told:
        Keys(path)

    assert (
        str(told.value)
        == f"""
cannot use the API keys: {path} has 9 problems
  line 3: should be NAME KEY, has 1 word
  line 4: should be NAME KEY, has 4 words
  line 5: the key should be 16 to 256 printable ASCII characters
  line 6: the name should be 1 to 64 of the characters A-Z a-z 0-9 _ . -
  line 6: the key should be 16 to 256 printable ASCII characters
  line 7: the name is that of line 1
  line 8: the key is that of line 1
  line 9: the key should be 16 to 256 printable ASCII characters
  line 10: the key should be 16 to 256 printable ASCII characters
"""[1:-1]
    )


@pytest.mark.parametrize("text", ["", "\n\n", "# nobody yet\n"])
def test_a_file_without_a_key_is_a_mistake(text: str, tmp_path: Path) -> None:
    with pytest.raises(KeysError) as told:
        Keys(a_file(tmp_path, text))

    assert told.value.problems == ("there is no key in it",)


def test_a_file_that_cannot_be_read_is_a_problem_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="has 1 problem\n  cannot be read: No such file or directory"):
        Keys(tmp_path / "nowhere")
    with pytest.raises(KeysError, match="cannot be read: Is a directory"):
        Keys(tmp_path)


@given(text=st.binary())
def test_any_file_is_keys_or_a_clean_error(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = a_file(tmp_path_factory.mktemp("keys"), text)
    try:
        assert Keys(path).names
    except KeysError as error:
        assert error.problems  # noqa: PT017 (either outcome is fine)


def test_a_reload_takes_the_new_keys_and_forgets_the_old(tmp_path: Path) -> None:
    path = a_file(tmp_path, f"anna {ANNA}")
    keys = Keys(path)
    a_file(tmp_path, f"bob {BOB}")

    keys.reload()

    assert keys.name_of(f"Bearer {ANNA}") is None
    assert keys.name_of(f"Bearer {BOB}") == "bob"


def test_a_bad_file_leaves_the_old_keys_in_force(tmp_path: Path) -> None:
    path = a_file(tmp_path, f"anna {ANNA}")
    keys = Keys(path)
    a_file(tmp_path, f"bob {BOB}\nbob {BOB}")

    with pytest.raises(KeysError):
        keys.reload()
    path.unlink()
    with pytest.raises(KeysError):
        keys.reload()

    assert keys.name_of(f"Bearer {ANNA}") == "anna"
    assert keys.name_of(f"Bearer {BOB}") is None


def test_no_key_can_be_read_out_of_what_is_kept(tmp_path: Path) -> None:
    keys = Keys(a_file(tmp_path, f"anna {ANNA}"))

    assert ANNA not in repr(vars(keys))


# -- the door ---------------------------------------------------------------------------------------------


async def whoever(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the name under which the request came in."""
    name = scope.get("state", {}).get("client", "a stranger")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": name.encode()})


def asked(tmp_path: Path, path: str, **headers: str) -> httpx.Response:
    keys = Keys(a_file(tmp_path, f"anna {ANNA}\nbob {BOB}"))

    async def scenario() -> httpx.Response:
        transport = httpx.ASGITransport(RequireKey(whoever, keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return run(scenario())


def test_a_key_opens_the_door_under_its_name(tmp_path: Path) -> None:
    answer = asked(tmp_path, "/v1/models", authorization=f"Bearer {BOB}")

    assert (answer.status_code, answer.text) == (200, "bob")


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "an API key is needed: send a key of this server as `Authorization: Bearer KEY`"),
        (
            {"authorization": "Bearer sk-nobody-0123456789"},
            "there is no such API key: send a key of this server as `Authorization: Bearer KEY`",
        ),
    ],
)
def test_without_a_key_the_answer_says_how_to_send_one(headers: dict[str, str], said: str, tmp_path: Path) -> None:
    answer = asked(tmp_path, "/v1/models", **headers)

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json() == {
        "error": {"message": said, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    }


@pytest.mark.parametrize("path", sorted(OPEN))
def test_probes_need_no_key(path: str, tmp_path: Path) -> None:
    assert asked(tmp_path, path).text == "a stranger"


@pytest.mark.parametrize(
    "path", ["/metrics", "/docs", "/openapi.json", "/healthz/", "/healthz/x", "/HEALTHZ", "//healthz", "/nowhere"]
)
def test_everything_else_does_also_what_does_not_exist(path: str, tmp_path: Path) -> None:
    assert asked(tmp_path, path).status_code == 401
