"""Logs of certificates: what is written is read, and the radii tell alpha and n."""

import numpy as np
import pytest
from scipy import special, stats

from certjax.certificate import average_certified_radius
from experiments import cohen_logs
from experiments.cohen_logs import attained, identify, read, Row, summary, write
from experiments.runs import RunError


HEAD = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
LINES = (
    "0\t7\t7\t0.91\t1\t0:00:14.500000\n"
    "20\t2\t-1\t0.0\t0\t0:00:10.000000\n"
    "40\t1\t3\t0.525\t0\t0:01:10.250000\n"
)


def log_of(tmp_path, text):
    path = tmp_path / "log"
    path.write_text(text)
    return path


def published(sigma, alpha, n, count=400, seed=0):
    """A log as the published code prints it: nearest, three significant digits."""
    share = np.random.default_rng(seed).beta(6, 0.3, count)
    votes = np.random.default_rng(seed + 1).binomial(n, share)
    lower = stats.beta.ppf(alpha, votes, n - votes + 1)
    radii = np.where(lower > 0.5, sigma * special.ndtri(lower), 0.0)
    lines = [
        f"{i}\t3\t{3 if r > 0 else -1}\t{r:.3}\t{int(r > 0)}\t0:00:01.0\n"
        for i, r in enumerate(radii)
    ]
    return HEAD + "".join(lines)


def test_reads_the_columns(tmp_path):
    log = read(log_of(tmp_path, HEAD + LINES))
    assert log.rows[0] == (0, 7, 7, 0.91, True, 14.5, "0.91")
    assert log.rows[1] == (20, 2, -1, 0.0, False, 10.0, "0.0")
    assert log.rows[2] == (40, 1, 3, 0.525, False, 70.25, "0.525")
    assert (log.torn, log.disagreeing) == (0, 0)


def test_numbers_of_the_papers(tmp_path):
    """A wrong class counts radius 0; at radius 0 an abstention is no certificate."""
    found = summary(read(log_of(tmp_path, HEAD + LINES)).rows, radii=(0.0, 0.5, 1.0))
    assert found["acr"] == pytest.approx(0.91 / 3)
    assert found["certified"] == {0.0: 1 / 3, 0.5: 1 / 3, 1.0: 0.0}
    assert (found["abstained"], found["examples"]) == (1 / 3, 3)


@pytest.mark.parametrize("cut", range(1, len("40\t1\t3\t0.525\t0\t0:01:10.250000\n")))
def test_torn_last_line_is_left_out(tmp_path, cut):
    """Wherever the process was killed while it wrote."""
    log = read(log_of(tmp_path, (HEAD + LINES)[:-cut]))
    assert [row.index for row in log.rows] == [0, 20]
    assert log.torn == 1


def test_running_total_in_place_of_correct_is_noticed(tmp_path):
    """Some published logs count up in that column."""
    text = LINES.replace("\t0.525\t0\t", "\t0.525\t1\t")
    log = read(log_of(tmp_path, HEAD + text))
    assert log.disagreeing == 1
    assert not log.rows[2].correct


def test_abstention_on_label_minus_one_is_not_correct(tmp_path):
    log = read(log_of(tmp_path, HEAD + "0\t-1\t-1\t0.0\t0\t0:00:01\n"))
    assert not log.rows[0].correct


def test_what_is_written_is_read(tmp_path):
    """Full precision: no radius is rounded at all, hence none is rounded up."""
    radii = np.random.default_rng(0).uniform(0, 4, 50).tolist()
    rows = [Row(i, i % 3, 1, r, i % 3 == 1, 3661.5 * i) for i, r in enumerate(radii)]
    path = tmp_path / "log"
    write(path, rows)
    log = read(path)
    assert [row[:5] for row in log.rows] == [row[:5] for row in rows]
    np.testing.assert_allclose(
        [row.seconds for row in log.rows], [row.seconds for row in rows], atol=1e-5
    )
    assert (log.torn, log.disagreeing) == (0, 0)


@pytest.mark.parametrize("alpha", [0.01, 0.001])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_log_tells_its_own_alpha_and_n(tmp_path, sigma, alpha):
    rows = read(log_of(tmp_path, published(sigma, alpha, 100_000))).rows
    best, second = identify(rows, sigma)[:2]
    assert best == (alpha, 100_000, 1.0)
    assert second.attained < 1.0


def test_the_examples_of_a_log_in_a_word():
    assert cohen_logs.span(range(0, 9981, 20)) == "0:9981:20"
    assert cohen_logs.span([40, 0, 20]) == "0:41:20"
    assert cohen_logs.span([7]) == "7:8:1"
    few, others = cohen_logs.span([0, 1, 3]), cohen_logs.span([0, 2, 3])
    assert few.startswith("crc ")
    assert few != others


def test_a_log_of_few_small_radii_tells_several(tmp_path, capsys):
    """With n = 100,000 every small radius of three digits is attained at any alpha."""
    lines = (f"{i}\t3\t3\t0.{i}5\t1\t0:00:01.0\n" for i in range(1, 9))
    path = log_of(tmp_path, HEAD + "".join(lines))
    found = {match.alpha for match in cohen_logs.consistent(read(path).rows, 0.5)}
    assert {0.05, 0.01, 0.001} <= found
    cohen_logs.main([str(path), "--sigma", "0.5"])
    assert "0.01, 100000 or" in " ".join(capsys.readouterr().out.split())


def test_our_own_log_tells_it_as_well(tmp_path):
    """Full precision, each radius 1e-9 below the exact one."""
    from certjax.smoothing import Gaussian
    from certjax.smoothing.confidence import proportion_lower

    lower = proportion_lower(np.arange(600, 1001, 7), 1000, 0.001)
    rows = [
        Row(i, 0, 0, Gaussian(0.5).radius(p), True, 1.0) for i, p in enumerate(lower)
    ]
    write(tmp_path / "log", rows)
    found = identify(read(tmp_path / "log").rows, 0.5)
    assert found[0] == (0.001, 1000, 1.0)
    assert found[1].attained < 0.2


def test_impossible_radius_is_not_attained():
    """3.9105 sigma needs alpha 0.01; at 0.001 the largest is 3.81 sigma."""
    rows = [Row(0, 0, 0, 3.9105, True, 1.0, "3.9105")]
    assert attained(rows, 1.0, 0.01, 100_000) == 1.0
    assert attained(rows, 1.0, 0.001, 100_000) == 0.0
    assert np.isnan(attained([Row(0, 0, -1, 0.0, False, 1.0)], 1.0, 0.01, 1000))


def test_acr_is_that_of_the_library(tmp_path):
    rows = read(log_of(tmp_path, published(0.5, 0.001, 10_000))).rows
    expected = average_certified_radius(np.asarray([row.radius for row in rows]))
    assert summary(rows)["acr"] == pytest.approx(expected)


BAD = {
    r"no log": None,
    r"expected the columns idx.*got 'a b'": "a b\n",
    r"expected the columns idx.*got ''": "",
    r"holds no whole line": HEAD + "0\t7\t7",
    r"has example 0 twice.*keep": HEAD + LINES + LINES,
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_log(tmp_path, message):
    path = tmp_path / "log"
    if BAD[message] is not None:
        path.write_text(BAD[message])
    with pytest.raises(RunError, match=message):
        read(path)


def test_command_prints_a_table(tmp_path, capsys):
    path = log_of(tmp_path, published(0.5, 0.01, 100_000))
    cohen_logs.main([str(path), "--sigma", "0.5"])
    assert "0.01, 100000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cohen_logs.main([str(tmp_path / "none")])
