"""`blocktune vllm serve` over data/tiny and an adapter: it starts while other tests run."""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import valkey_server
from vllm_cases import TINY, make_adapter, questions

import blocktune
from blocktune import Engine
from blocktune.prompt import LayoutSpec

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32"]
OPTIONS += ["--tensor-parallel-size", "2", "--max-num-seqs", "8"]
OPTIONS += ["--served-model-name", TINY, "alias"]


class Serving:
    """The server over ``folder / "store"``, which is warm; `engines` are the references."""

    def __init__(self, folder: Path):
        self.store, self._log = folder / "store", folder / "server.log"
        adapter = make_adapter(folder / "tuned", LayoutSpec(), True)
        packet = make_adapter(folder / "packet", LayoutSpec(num_headers=1), False)
        options = {"store": self.store, "dtype": "float32", "device": "cpu"}
        self.engines = {
            TINY: Engine.from_pretrained(TINY, **options),
            "tuned": Engine.from_pretrained(TINY, adapter, **options),
        }
        for engine in self.engines.values():
            engine.encode([chunk for one in questions(31) for chunk in one.chunks])
        self.env, port = _installed(folder / "site"), valkey_server.free_port()
        command = [sys.executable, "-m", "blocktune.cli", "vllm", "serve", TINY]
        command += ["--store", str(self.store), "--adapter", str(adapter), "--port", str(port)]
        command += ["--adapter", str(packet)]
        command += ["--host", "127.0.0.1", "--encode-wait", "120", *OPTIONS]
        self._url = f"http://127.0.0.1:{port}"
        with self._log.open("w") as file:
            self._running = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=file, stderr=file
            )

    def url(self) -> str:
        """Its address, once it answers."""
        while not self._answers():
            assert self._running.poll() is None, self._log.read_text()[-3000:]
            time.sleep(0.1)
        return self._url

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self._url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def close(self):
        self._running.terminate()
        self._running.wait(30)


def _installed(folder: Path) -> dict[str, str]:
    """An environment with the checkout as an installed package: vLLM finds its plug-ins."""
    info = folder / f"blocktune-{blocktune.__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: blocktune\nVersion: {blocktune.__version__}\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        [f"[{group}]", *(f"{k} = {v}" for k, v in one.items())] for group, one in points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(line for part in lines for line in part))
    one_process = ("VLLM_ENABLE_V1_MULTIPROCESSING",)
    kept = {key: value for key, value in os.environ.items() if key not in one_process}
    return kept | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
