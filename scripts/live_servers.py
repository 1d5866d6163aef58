"""vLLM servers on CPU cores, prefill and decode apart, with governors: something for ``biscale-gym live`` to attach to.

    .venv-live/bin/python scripts/live_servers.py --folder results/servers

One server per instance of the scenario's placement, all on 127.0.0.1; the command to attach to them is printed when
they are up. They end with this program.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tyro

from biscale_gym.cluster.placement import PHASES
from biscale_gym.config import ConfigError, load_preset
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live.errors import LiveError
from biscale_gym.live.servers import Started, await_up, start, stop
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.signals import ending_signals_raise

WATCH_S = 1.0


def serve(
    scenario: str = "live-smoke",
    workers: str = "cpu",
    folder: Path = Path("results/servers"),
    controller: str | None = None,
) -> int:
    """Start the servers and wait until one of them ends, or this program is told to.

    Args:
        scenario: Scenario preset or YAML file; its placement says which servers there are.
        workers: Preset of live settings, or a YAML file.
        folder: For the model, logs, and the governors' settings and sockets; short, as socket paths are.
        controller: Whose policies set the clocks while nobody is attached.

    Returns:
        1 after a server has ended by itself, else 0.
    """
    settings = load_preset(LiveSettings, "live", workers)
    started: list[Started] = []
    try:
        for server in start(scenario, load_scenario(scenario), settings, folder, controller):
            started.append(server)
            print(f"{server.name}: {server.url}, process {server.process.pid}, {server.log}", flush=True)
        await_up(started, settings.start_limit_s)
        urls = {phase: ",".join(each.url for each in started if each.phase == phase) for phase in PHASES}
        given = "".join(f" --{phase}-url {urls[phase]}" for phase in PHASES)
        print(f"up; biscale-gym live --scenario {scenario}{given} --governors {folder}", flush=True)
        while True:
            for server in started:
                if server.process.poll() is not None:
                    print(f"{server.name} ended with status {server.process.returncode}: {server.log}", file=sys.stderr)
                    return 1
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return 0
    finally:
        stop(started)


if __name__ == "__main__":
    try:
        with ending_signals_raise():
            sys.exit(tyro.cli(serve))
    except (ConfigError, LiveError) as error:
        sys.exit(f"error: {error}")
