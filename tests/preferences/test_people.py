"""Accounts: what a token opens, for how long, and what of it the database knows."""

import sqlite3

import pytest

from trivium.config import UserError
from trivium.preferences.store import People, Person, Refused
from trivium.preferences.store.people import NotInvited


def test_an_invitation_opens_one_session_and_only_once(store):
    people = People(store)
    token = people.invite("ann")
    session, person = people.accept(token)
    assert person == Person(name="ann", role="annotator")
    assert people.whose(session) == person
    for wrong in (token, "", "x", session, token[:-1], "\ud800"):
        with pytest.raises(NotInvited):
            people.accept(wrong)
    assert people.whose("") is None and people.whose(token) is None
    assert [(p.name, p.signed_in) for p in people.all()] == [("ann", 1)]
    people.sign_out(session)
    assert people.whose(session) is None


def test_time_ends_invitations_and_sessions(store, monkeypatch):
    people = People(store)
    with pytest.raises(NotInvited):
        people.accept(people.invite("ann", valid_s=-1.0))
    monkeypatch.setattr("trivium.preferences.store.people.SESSION_S", -1.0)
    session, _ = people.accept(people.invite("ann"))
    assert people.whose(session) is None


def test_revoked_is_out_at_once_and_stays_out(store):
    people = People(store)
    session, _ = people.accept(people.invite("ann", "lead"))
    waiting = people.invite("ann", "lead")
    people.revoke("ann")
    assert people.whose(session) is None
    with pytest.raises(NotInvited):
        people.accept(waiting)
    with pytest.raises(UserError, match="revoked"):
        people.invite("ann", "lead")
    with pytest.raises(UserError, match="nobody called 'bob'"):
        people.revoke("bob")
    assert [p.revoked for p in people.all()] == [True]


def test_a_second_link_keeps_the_role(store):
    people = People(store)
    people.invite("ann", "lead")
    with pytest.raises(UserError, match="lead already"):
        people.invite("ann", "admin")
    _, person = people.accept(people.invite("ann", "lead"))
    assert person.role == "lead"
    for name, role in (("", "annotator"), ("x" * 101, "annotator"), ("a\nb", "annotator")):
        with pytest.raises(Refused):
            people.invite(name, role)
    with pytest.raises(UserError, match="no role"):
        people.invite("bob", "king")


def test_roles_hold_those_below_them():
    assert [
        [Person(name="x", role=r).may(s) for s in ("annotator", "lead", "admin")]
        for r in ("annotator", "lead", "admin")
    ] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert not Person(name="x", role="admin", revoked=True).may("annotator")


def test_no_token_is_in_the_database(tmp_path):
    from trivium.preferences.store import Store

    with Store(tmp_path / "p.db") as store:
        people = People(store)
        token = people.invite("ann")
        session, _ = people.accept(token)
    raw = sqlite3.connect(tmp_path / "p.db")
    dump = "\n".join(raw.iterdump())
    assert "ann" in dump and token not in dump and session not in dump
