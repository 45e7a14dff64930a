"""The warm-up that compiles kernels ahead does all of its pieces (a dry run of a few)."""

from __future__ import annotations

from tests.gpu import test_operators, test_tiles, warm


def test_the_shares_cover_all_pieces() -> None:
    pieces = list(warm.work("cpu", "reference"))
    tests = len(test_operators.CONVOLUTIONS) + len(test_operators.NORMS) + len(test_tiles.CASES) * len(test_tiles.OPS)
    assert len(pieces) == 3 + tests
    shares = 25
    assert sum(number % shares == 5 for number in range(len(pieces))) == warm.main(f"5/{shares}", "cpu", "reference")


def test_a_failing_piece_does_not_stop_the_others(capsys, monkeypatch) -> None:
    class PtxasError(Exception):
        """As Triton has it."""

    def broken() -> None:
        raise PtxasError("ptxas failed")

    monkeypatch.setattr(warm, "work", lambda *_: iter([broken, lambda: None]))
    assert warm.main("0/1", "cpu", "reference") == 2
    assert "piece 0: ptxas failed" in capsys.readouterr().err
