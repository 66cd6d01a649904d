"""Who gets a session of the console, and how long it lasts."""

from datetime import UTC, datetime, timedelta

from bridge.console.sessions import SESSION_LIFE, Session, Sessions, hash_token

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TOKENS = {"anna": "token-of-anna", "ben": "token-of-ben"}


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def sessions(clock: Clock | None = None) -> Sessions:
    hashes = {name: hash_token(token) for name, token in TOKENS.items()}
    return Sessions(hashes, clock=clock or Clock())


def opened_by(made: Sessions, token: str) -> Session:
    session = made.open(token)
    assert session is not None
    return session


def test_each_operator_logs_in_with_a_token_of_their_own() -> None:
    """The session names the operator. Two sessions share neither the cookie's value nor the secret of the forms."""
    made = sessions()
    opened = [opened_by(made, token) for token in (*TOKENS.values(), *TOKENS.values())]
    assert [each.operator for each in opened] == ["anna", "ben", "anna", "ben"]
    assert len({secret for each in opened for secret in (each.key, each.csrf)}) == 8
    assert [made.find(each.key) for each in opened] == opened


def test_no_other_text_opens_a_session() -> None:
    """Neither a part of a token, nor its hash as the settings keep it, nor the name of an operator."""
    made = sessions()
    for wrong in ("", "anna", "token-of-ann", "token-of-anna ", hash_token("token-of-anna"), "\udcff", "t" * 5000):
        assert made.open(wrong) is None
    assert made.find("") is None


def test_a_session_ends_at_its_time_however_much_it_is_used() -> None:
    """The bound is absolute."""
    clock = Clock()
    made = sessions(clock)
    key = (opened_by(made, TOKENS["anna"])).key
    clock.now += SESSION_LIFE - timedelta(seconds=1)
    assert made.find(key) is not None
    clock.now += timedelta(seconds=1)
    assert made.find(key) is None


def test_a_closed_session_is_over() -> None:
    """A copy of the cookie is worth nothing after the logout."""
    made = sessions()
    session = opened_by(made, TOKENS["anna"])
    made.close(session)
    assert made.find(session.key) is None


def test_the_number_of_open_sessions_is_limited() -> None:
    """The oldest session is closed in favor of a new one."""
    made = sessions()
    keys = [(opened_by(made, TOKENS["anna"])).key for _ in range(101)]
    assert made.find(keys[0]) is None
    assert all(made.find(key) for key in keys[1:])
