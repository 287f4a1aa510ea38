"""How many requests are in flight: as many as the engine takes, with no setting by anybody."""

from resources.engine.level import MOST, START, Level
from resources.engine.protocol import Load


class Server:
    """Runs so many at once; what is more waits. Its load is what a level sees."""

    def __init__(self, most: int) -> None:
        self.most = most

    def load(self, in_flight: int) -> Load:
        running = min(in_flight, self.most)
        return Load(running, in_flight - running, 0, 0)


def settle(level: Level, server: Server, available: int = 1_000_000, looks: int = 20) -> int:
    for _ in range(looks):
        in_flight = min(level.now, available)
        level.follow(server.load(in_flight), in_flight)
    return level.now


def test_level_grows_until_some_wait_at_the_engines_door() -> None:
    for most in (64, 128, 256, 1024):
        now = settle(Level(), Server(most))
        assert most < now <= 2 * most + 16


def test_growth_takes_few_looks() -> None:
    level = Level()
    settle(level, Server(1024), looks=8)
    assert level.now > 1024


def test_load_from_before_the_requests_came_does_not_raise_it() -> None:
    level = Level(most_running=64)
    for _ in range(20):
        level.follow(Load(0, 0, 0, 0), level.now)
    assert level.now == 80


def test_level_goes_back_when_many_wait() -> None:
    level = Level()
    settle(level, Server(512))
    assert 16 < settle(level, Server(16)) <= 16 + 3 * 8 + 1


def test_level_stays_once_it_is_right() -> None:
    level = Level()
    now = settle(level, Server(200))
    assert {settle(level, Server(200), looks=1) for _ in range(50)} == {now}


def test_few_requests_left_do_not_raise_it() -> None:
    assert settle(Level(), Server(256), available=10) == START


def test_it_never_grows_without_end() -> None:
    assert settle(Level(), Server(1_000_000), looks=100) == MOST


def test_number_in_the_catalog_stands() -> None:
    level = Level(7)
    level.too_much()
    assert settle(level, Server(512)) == 7


def test_known_limit_is_where_it_starts() -> None:
    assert Level(most_running=32).now == 40


def test_engine_without_room_gets_less_and_slowly_more_again() -> None:
    level = Level()
    for _ in range(10):
        level.too_much()
    assert level.now < START / 8
    for _ in range(START):
        level.fine()
    assert level.now == START
    for _ in range(100):
        level.too_much()
    assert level.now == 1
