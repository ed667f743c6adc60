"""The meeting of the processes of a run, before JAX connects them.

JAX alone would wait for five minutes, and end a process with SIGABRT if a peer is
missing, and with SIGSEGV if the port is in use.
"""

import contextlib
import json
import os
import socket
import time

JOINED = "joined"  # the answer of process 0; any other is an error


def meet(address: str, count: int, index: int, seconds: float) -> None:
    """Wait until all processes of a run have joined process 0.

    Args:
        address: HOST:PORT of process 0, which is free again on return.
        count: number of processes.
        index: of this process.
        seconds: to wait for the others.

    Raises:
        ValueError: a process is missing or there twice, or the port is in use.
    """
    if index:
        answer = _join(address, [index, count], seconds)
    else:
        answer = _collect(address, count, seconds)
    if answer != JOINED:
        raise ValueError(answer)


def _collect(address: str, count: int, seconds: float) -> str:
    """Return the answer of process 0, and send it to all that have joined."""
    both, port = socket.has_dualstack_ipv6(), int(address.rpartition(":")[2])
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        return (
            f"coordinator_address: expected a free port, got {address} "
            f"({os.strerror(error.errno or 0)}). Take another port, or another "
            "--process-id if process 0 is already running."
        )
    end, joined, answer = time.monotonic() + seconds, {0}, JOINED
    with server, contextlib.ExitStack() as stack:
        links = []
        while answer == JOINED and len(joined) < count:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                link = stack.enter_context(server.accept()[0])
                link.settimeout(5)
                index, their_count = json.loads(link.recv(64))
            except (OSError, ValueError, TypeError):  # too late, or no process of ours
                if time.monotonic() > end:
                    missing = ", ".join(map(str, sorted({*range(count)} - joined)))
                    answer = (
                        f"num_processes: expected {count} within {seconds:g} s, got "
                        f"none with --process-id {missing}. Start it, or raise "
                        "--join-timeout."
                    )
                continue
            if index in joined or their_count != count:
                answer = (
                    f"process_id: expected 0 to {count - 1} once each, got another "
                    f"{index} of {their_count}. Start each process once."
                )
            joined.add(index)
            links.append(link)
        for link in links:
            with contextlib.suppress(OSError):  # it has ended since
                link.sendall(json.dumps(answer).encode())
    return answer


def _join(address: str, place: list[int], seconds: float) -> str:
    """Return the answer of process 0, or that there is none."""
    host, _, port = address.rpartition(":")
    end, answer, reason = time.monotonic() + seconds, "", ""
    while not answer and time.monotonic() < end:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), 5) as link:
                link.sendall(json.dumps(place).encode())
                link.settimeout(seconds + 5)  # process 0 may have started after this
                said = link.makefile(errors="replace").read()
            reason = f" (another program says {said[:40]!r})" if said else reason
            answer = json.loads(said)
        except OSError as error:
            reason = f" ({error.strerror or error})"
            time.sleep(0.1)  # process 0 may not have started yet
        except ValueError:
            time.sleep(0.1)
    return answer or (
        f"coordinator_address: expected process 0 at {address} within {seconds:g} s, "
        f"got no answer{reason}. Start it, or raise --join-timeout."
    )
