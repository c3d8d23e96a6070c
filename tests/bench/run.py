#!/usr/bin/env python3
"""Measures a dataplane, and passt beside it, on a guest of namespaces: a table, and a JSON line a figure.

  cargo build --release --workspace --bins && tests/bench/run.py [--bin DIR] [--secs 5] [--repeats 3]
      [--turn-secs 2] [--targets vnet,passt] [--figures bulk,guests,conn,miss,pending,idle] [--mtus 1500,65520]
      [--held 10000] [--json FILE] [--check]

Needs Linux with user namespaces and /dev/net/tun, iproute2 and iperf3; passt is measured if it is there.
Needs no root: it starts itself again under `unshare`. Nothing leaves the namespaces it makes.

  "host" namespace                                    a namespace per load
  controlplane, dataplane (or passt), servers on ◀── Unix socket ── vnet-load guest: TAP, iperf3 or
  10.99.0.1 and, for misses, 10.98.0.0/16            qemu framing   vnet-load connect

Figures (the names of a field say its unit):
  bulk   iperf3, MTU 1500 and 65520, up and down: Gbit/s, CPU seconds of the target per 10^9 bytes; with
         frames written many at a time and one at a time, as QEMU does. All targets stand side by side and take
         turns of --turn-secs, as many as make --repeats times --secs, and at least 24 of what --check looks at;
         what all turns cost, of what passt's did, is a figure of its own, with the range of two standard errors
  guests iperf3 from one guest to another: switched plainly, where nothing is given, and filtered, where a rule
         opens the one to the other
  conn   connections per second at 64 in flight (connect, a byte each way, close), the verdict cached
  miss   the same, every connection to an address of its own under a policy with a rule by name, whose
         answers hold for one address: a question to the controlplane each. The controlplane's CPU is apart
  pending how long a connection takes, one at a time, before and while 1,000 questions of the same guest are
         open: for that guest, and for another at the same time
  idle   resident memory at rest, and for each of --held idle connections
Rates depend on the machine and on what else runs on it: compare within one sitting.

--check fails where vnet does worse than it is held to: CPU for each byte beside passt (the ratios of the prototype
that the architecture was drawn from, and a tenth), the part of connections that misses leave, the 99th percentile
while 1,000 questions are open, and the memory of an idle connection. Only what was measured is checked.
"""
import argparse, contextlib, json, os, pathlib, re, resource, shutil, signal, statistics, subprocess, sys, tempfile, time

HERE = pathlib.Path(__file__).resolve()
SERVER, MANY, PORT, PORTS = "10.99.0.1", "10.98.0.0", 7000, 8
# Nothing is there, and nobody is to find out: what goes there is asked about.
ASKED, QUESTIONS = "10.97.0.0", 1_000
TICKS = os.sysconf("SC_CLK_TCK")
# CPU for each byte beside passt's, of the prototype, by direction, MTU and frames a write (large ones many at a time
# break passt's upload).
PROTOTYPE = {("up", 1500, 64): 1.07, ("down", 1500, 64): 0.88, ("up", 65520, 1): 1.72, ("down", 65520, 64): 1.28}
# Turns that such a ratio is of. With fewer it tells of the machine: one turn alone is up to a third off.
CHECKED_TURNS = 24
# Connections per second of the prototype, with a verdict cached and with a miss for each.
CACHED, MISSED = 5_500, 3_000
# Of passt, beside it then.
PASST_CONNECTS = 5_169
IDLE_BYTES_MAX = 16 << 10
POLICY = """version: 1
defaultAction: deny
rules:
{extra}  - action: allow
    cidr: "10.98.0.0/16"
    protocol: tcp
  - action: allow
    cidr: "10.99.0.1/32"
    protocol: tcp
"""
ASK = """mode: ask
approvalTimeout: 600
"""
BETWEEN_GUESTS = """  - action: allow
    cidr: "192.168.127.0/24"
    protocol: tcp
"""
BY_NAME = """  - action: allow
    domains: ["*.name.example"]
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default=str(HERE.parents[2] / "target/release"), help="where the programs are")
    parser.add_argument("--secs", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turn-secs", type=int, default=2, help="of a run of bulk, whole seconds")
    parser.add_argument("--targets", default="vnet,passt")
    parser.add_argument("--figures", default="bulk,guests,conn,miss,pending,idle")
    parser.add_argument("--mtus", default="1500,65520", help="of bulk")
    parser.add_argument("--held", type=int, default=10_000)
    parser.add_argument("--json", help="also append the JSON lines to this file")
    parser.add_argument("--check", action="store_true", help="fail where vnet does worse than it is held to")
    return parser.parse_args()


def own_namespaces():
    """Starts this program again in namespaces of its own, as root there."""
    if os.environ.get("VNET_BENCH_INSIDE"):
        return
    os.environ["VNET_BENCH_INSIDE"] = "1"
    os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child",
                          "--mount-proc", sys.executable, str(HERE), *sys.argv[1:]])


def sh(*words):
    subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True)


def stat(pid):
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2:].split()


def cpu(pid):
    """CPU seconds, user and system, of all threads."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_kb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])


class Lab:
    """Servers, a target and its socket. Of several labs at once the first alone has servers."""

    def __init__(self, options, target, mtu=1500, by_name=False, ask=False, guests=None, servers=True):
        self.options, self.target, self.mtu = options, target, mtu
        self.bin = pathlib.Path(options.bin)
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="vnet-bench-"))
        self.socket = self.dir / "vm.sock"
        self.processes, self.controlplane, self.by_name, self.guests = [], None, by_name, 0
        self.ask, self.between, self.servers = ask, guests, servers

    def __enter__(self):
        try:
            if self.servers:
                self.start(self.bin / "vnet-load", "serve", "--bind", "0.0.0.0", "--port", PORT, "--ports", PORTS)
                self.start("iperf3", "-s", "-B", SERVER)
            if self.target == "vnet":
                policy = self.dir / "policy.yaml"
                extra = (BY_NAME if self.by_name else "") + (BETWEEN_GUESTS if self.between == "filtered" else "")
                policy.write_text((ASK if self.ask else "") + POLICY.format(extra=extra))
                under = [] if self.between == "plain" else ["--network-policy", policy]
                self.controlplane = self.start(
                    self.bin / "vnet-controlplane", "--listen", f"unix://{self.dir}/control.sock", "--session-listen",
                    f"unix://{self.dir}/session.sock", "--store", "memory:", *under, "--log-level", "warn,vnet_controlplane::server=debug")
                self.until_there(self.dir / "session.sock")
                self.process = self.start(self.bin / "vnet-dataplane", "--controlplane", f"unix://{self.dir}/session.sock",
                                          "--vm", "bench", "--mtu", self.mtu, "--listen-qemu", f"unix://{self.socket}")
                self.gateway = "192.168.127.1"
            else:
                self.process = self.start("passt", "-f", "-s", self.socket, "-m", self.mtu, "-4", "-a", "10.88.0.2", "-n", "24",
                                          "-g", "10.88.0.1", "-t", "none", "-u", "none", "--runas", "0")
                self.gateway = "10.88.0.1"
            self.until_there(self.socket)
            # The first frames of all open the way.
            self.load("connect", "--to", SERVER, "--secs", "0.2", "--parallel", "1")
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def start(self, *words):
        log = open(self.dir / "log", "ab")
        process = subprocess.Popen([str(w) for w in words], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def until_there(self, path):
        end = time.monotonic() + 10
        while not path.exists():
            if time.monotonic() > end or any(p.poll() is not None for p in self.processes):
                raise SystemExit(f"{self.target} did not come up:\n" + (self.dir / "log").read_text()[-2000:])
            time.sleep(0.01)

    def until_gone(self, beside=0):
        """Waits until no more guests are there than these: under a policy, one that ended may come back for a while, and
        another that comes beside it waits."""
        end = time.monotonic() + 20
        while True:
            log = (self.dir / "log").read_text()
            if log.count("guest attached") - log.count("guest detached") <= beside:
                return
            if time.monotonic() > end:
                raise SystemExit("a guest is still there:\n" + log[-2000:])
            time.sleep(0.1)

    def misses(self):
        """Questions that the controlplane got, all told: it says so when it ends, and so it is ended by this."""
        self.process.terminate()
        self.process.wait(10)
        self.controlplane.terminate()
        self.controlplane.wait(10)
        log = re.sub(r"\x1b\[[0-9;]*m", "", (self.dir / "log").read_text())
        return int(re.search(r"vnet_controlplane_misses_total\S* value=(\d+)", log)[1])

    def until_asked(self, count):
        end = time.monotonic() + 20
        while True:
            words = [self.bin / "vnetctl", "--server", f"unix://{self.dir}/control.sock", "pending", "list", "-o", "json"]
            listed = subprocess.run([str(w) for w in words], capture_output=True, text=True)
            if listed.returncode == 0 and len(json.loads(listed.stdout)) >= count:
                return
            if time.monotonic() > end:
                raise SystemExit(f"{count} questions were not asked: {listed.stdout[-300:]}{listed.stderr}")
            time.sleep(0.1)

    def guest(self, *command, batch=64):
        """A guest's command, as an argv. Each is a guest of its own, with an address of its own."""
        self.guests += 1
        address = f"192.168.127.{1 + self.guests}/24" if self.target == "vnet" else "10.88.0.2/24"
        words = [self.bin / "vnet-load", "guest", "--socket", self.socket, "--mtu", self.mtu, "--address", address,
                 "--gateway", self.gateway, "--batch", batch, "--", *command]
        return [str(w) for w in words]

    def load(self, *words):
        return self.json(self.guest(self.bin / "vnet-load", *words))

    def json(self, argv):
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=max(self.options.secs, self.options.turn_secs) + 60)
        try:
            return json.loads(ended.stdout)
        except ValueError:
            raise SystemExit(f"{argv}: {ended.stdout}{ended.stderr}\n" + (self.dir / "log").read_text()[-2000:])

    def measured(self, work):
        """What work gives, with the CPU seconds of the target and of its controlplane."""
        before = cpu(self.process.pid), cpu(self.controlplane.pid) if self.controlplane else 0
        result = work()
        result["cpu_s"] = cpu(self.process.pid) - before[0]
        result["controlplane_cpu_s"] = (cpu(self.controlplane.pid) if self.controlplane else 0) - before[1]
        return result


def middle(values):
    values = [v for v in values if v is not None]
    return round(statistics.median(values), 4) if values else None


def spread(values):
    return {"median": middle(values), "min": round(min(values), 4), "max": round(max(values), 4), "n": len(values)}


def iperf(lab, options, *flags, batch):
    """One run of iperf3 in a guest: Gbit/s, CPU seconds of the target, 10^9 bytes, segments sent again."""
    argv = lab.guest("iperf3", "-c", SERVER, "-t", options.turn_secs, "-J", *flags, batch=batch)
    for attempt in range(11):
        result = lab.measured(lambda: lab.json(argv))
        # A run that stalled leaves iperf3's server busy for a while: it says so and closes, with bytes unread.
        if not any(word in result.get("error", "") for word in ("busy", "reset by peer")):
            break
        time.sleep(2)
    if "error" in result:
        raise SystemExit(f"iperf3 through {lab.target}: {result['error']}")
    received = result["end"]["sum_received"]
    return received["bits_per_second"] * 1e-9, result["cpu_s"], received["bytes"] / 1e9, result["end"]["sum_sent"].get("retransmits")


def ratio(ours, theirs):
    """What ours cost for each byte of what theirs did, of all turns, and the range of two standard errors around it, by
    leaving out each turn once (jackknife)."""
    def cost(runs):
        return sum(run[1] for run in runs) / sum(run[2] for run in runs)
    whole, n = cost(ours) / cost(theirs), len(ours)
    without = [cost(ours[:i] + ours[i + 1:]) / cost(theirs[:i] + theirs[i + 1:]) for i in range(n)] if n > 1 else [whole]
    spare = 2 * (sum((one - whole) ** 2 for one in without) * (n - 1) / n) ** 0.5 if n > 1 else whole
    return {"of_all": round(whole, 4), "low": round(whole - spare, 4), "high": round(whole + spare, 4), "n": n}


def bulk(options, targets, emit):
    for mtu in map(int, options.mtus.split(",")):
        with contextlib.ExitStack() as stack:
            labs = [stack.enter_context(Lab(options, target, mtu, servers=first)) for first, target in
                    zip([True] + [False] * len(targets), targets)]
            for direction, flags, batch in (("up", [], 64), ("down", ["-R"], 64), ("up", [], 1)):
                runs = {target: [] for target in targets}
                turns = max(1, round(options.repeats * options.secs / options.turn_secs))
                if options.check and (direction, mtu, batch) in PROTOTYPE:
                    turns = max(turns, CHECKED_TURNS)
                for turn in range(turns):
                    # Neither goes first always.
                    for lab in labs if turn % 2 == 0 else reversed(labs):
                        runs[lab.target].append(iperf(lab, options, *flags, batch=batch))
                for lab in labs:
                    done = runs[lab.target]
                    emit(target=lab.target, figure=f"tcp_bulk_{direction}", mtu=mtu, batch=batch, secs=options.turn_secs,
                         gbit=spread([r[0] for r in done]), peer_cpu_s_per_gb=spread([r[1] / r[2] for r in done]),
                         retransmits=middle([r[3] for r in done]), rss_after_kb=rss_kb(lab.process.pid))
                if {"vnet", "passt"} <= runs.keys():
                    emit(target="vnet:passt", figure=f"tcp_bulk_{direction}_ratio", direction=direction, mtu=mtu, batch=batch,
                         cpu=ratio(runs["vnet"], runs["passt"]))


def between_guests(options, target, emit):
    if target != "vnet":
        return
    for mtu in (1500, 65520):
        for switch in ("plain", "filtered"):
            with Lab(options, target, mtu, guests=switch) as lab:
                # Its own ping makes it known.
                server = subprocess.Popen(lab.guest("sh", "-c", "ping -c 1 -W 5 192.168.127.1; exec iperf3 -s --forceflush"),
                                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                address = f"192.168.127.{1 + lab.guests}"
                for line in server.stdout:
                    if "Server listening" in line:
                        break
                runs = []
                for _ in range(options.repeats):
                    if switch == "filtered":
                        lab.until_gone(beside=1)
                    argv = lab.guest("iperf3", "-c", address, "-t", f"{options.secs:g}", "-J")
                    result = lab.measured(lambda: lab.json(argv))
                    if "error" in result:
                        raise SystemExit(f"iperf3: {result['error']}")
                    received = result["end"]["sum_received"]
                    runs.append((received["bits_per_second"] * 1e-9, result["cpu_s"] / (received["bytes"] / 1e9),
                                 result["end"]["sum_sent"].get("retransmits")))
                server.terminate()
                server.wait(10)
                emit(target=target, figure="tcp_between_guests", switch=switch, mtu=mtu, secs=options.secs,
                     gbit=spread([r[0] for r in runs]), peer_cpu_s_per_gb=spread([r[1] for r in runs]),
                     retransmits=middle([r[2] for r in runs]))


def connections(options, target, emit, miss=False):
    if miss and target != "vnet":
        return
    with Lab(options, target, by_name=miss) as lab:
        to = ["--to", MANY, "--addresses", 65_000] if miss else ["--to", SERVER, "--ports", PORTS]
        runs = []
        for _ in range(1 if miss else options.repeats):
            # Once only where each connection is to be new: an address asked about is cached.
            runs.append(lab.measured(lambda: lab.load("connect", *to, "--parallel", 64, "--secs", options.secs)))
        done = [max(r["done"], 1) for r in runs]
        asked = lab.misses() if target == "vnet" else None
        emit(target=target, figure="tcp_connrate_miss" if miss else "tcp_connrate", parallel=64, secs=options.secs,
             rate=spread([r["rate"] for r in runs]), total_p50_us=middle([r["p50_us"] for r in runs]),
             total_p99_us=middle([r["p99_us"] for r in runs]), fails=sum(r["fails"] for r in runs),
             peer_cpu_ms_per_conn=middle([r["cpu_s"] * 1e3 / n for r, n in zip(runs, done)]),
             controlplane_cpu_ms_per_conn=middle([r["controlplane_cpu_s"] * 1e3 / n for r, n in zip(runs, done)]),
             misses=asked, connections=sum(r["done"] for r in runs), error=next((r["error"] for r in runs if r["error"]), None))


def pending(options, target, emit):
    if target != "vnet":
        return
    with Lab(options, target, ask=True) as lab:
        one = [lab.bin / "vnet-load", "connect", "--to", SERVER, "--ports", PORTS, "--parallel", 1, "--secs", options.secs]
        before, same, other = [], [], []
        for _ in range(options.repeats):
            lab.until_gone()
            before.append(lab.json(lab.guest(*one)))
            asking = lab.guest(lab.bin / "vnet-load", "knock", "--to", ASKED, "--addresses", QUESTIONS, "--count", QUESTIONS,
                               "--", *one)
            same.append(lab.json(asking))
            holder = subprocess.Popen(lab.guest(lab.bin / "vnet-load", "knock", "--to", ASKED, "--addresses", QUESTIONS, "--count",
                                                QUESTIONS, "--", "cat"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            lab.until_asked(QUESTIONS)
            lab.until_gone(beside=1)
            other.append(lab.json(lab.guest(*one)))
            holder.stdin.close()
            holder.wait(30)
        for who, runs in (("nobody", before), ("itself", same), ("another", other)):
            emit(target=target, figure="connect_while_pending", asking=who, questions=0 if who == "nobody" else QUESTIONS,
                 rate=spread([r["rate"] for r in runs]), p50_us=spread([r["p50_us"] for r in runs]),
                 p99_us=spread([r["p99_us"] for r in runs]), fails=sum(r["fails"] for r in runs))


def idle(options, target, emit):
    with Lab(options, target) as lab:
        time.sleep(1)
        at_rest = rss_kb(lab.process.pid)
        holder = subprocess.Popen(lab.guest(lab.bin / "vnet-load", "hold", "--to", SERVER, "--count", options.held),
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        opened = json.loads(holder.stdout.readline())
        time.sleep(2)
        held = rss_kb(lab.process.pid)
        before = cpu(lab.process.pid)
        time.sleep(2)
        busy = cpu(lab.process.pid) - before
        holder.stdin.close()
        alive = json.loads(holder.stdout.readline() or "{}").get("alive")
        holder.wait(60)
        emit(target=target, figure="idle_conns", want=options.held, opened=opened["opened"], alive=alive, error=opened["error"],
             rss_idle_kb=at_rest, rss_held_kb=held, idle_cpu_pct=round(busy * 50, 2),
             rss_per_conn_bytes=round((held - at_rest) * 1024 / max(opened["opened"], 1)))


def beyond(rows):
    """What vnet's figures say that it may not: a line each."""
    worse = []

    def hold(what, value, most):
        if value > most:
            worse.append(f"{what}: {value:.2f}, at most {most:.2f}")

    of = {row["figure"]: row for row in rows if row["target"] == "vnet"}
    for row in rows:
        if row["figure"].endswith("_ratio") and (held := PROTOTYPE.get((row["direction"], row["mtu"], row["batch"]))):
            hold(f"CPU per byte {row['direction']} at MTU {row['mtu']}, of passt's", row["cpu"]["of_all"], 1.1 * held)
    if "tcp_bulk_up" in of and not any(row["figure"].endswith("_ratio") for row in rows):
        worse.append("CPU per byte was measured without passt, and so without what it is held to (Debian package passt)")
    beside = {row["figure"]: row for row in rows if row["target"] == "passt"}
    if "tcp_connrate" in of and "tcp_connrate" in beside:
        hold("connections of passt for each of vnet's", beside["tcp_connrate"]["rate"]["median"] / of["tcp_connrate"]["rate"]["median"],
             1.1 * PASST_CONNECTS / CACHED)
    for name in "tcp_connrate", "tcp_connrate_miss":
        if name in of:
            hold(f"connections that failed ({name})", of[name]["fails"], 0)
    if "tcp_connrate" in of and "tcp_connrate_miss" in of:
        hold("connections with a verdict cached, for each with a miss", of["tcp_connrate"]["rate"]["median"] /
             of["tcp_connrate_miss"]["rate"]["median"], CACHED / MISSED)
    if "tcp_connrate_miss" in of:
        hold("connections for each miss", of["tcp_connrate_miss"]["connections"] / max(of["tcp_connrate_miss"]["misses"], 1), 1)
    asked = {row["asking"]: row["p99_us"]["median"] for row in rows if row["figure"] == "connect_while_pending"}
    for who in asked.keys() - {"nobody"}:
        hold(f"99th percentile of connecting while {QUESTIONS} questions of {who} are open, of idle", asked[who] / asked["nobody"], 2)
    if "idle_conns" in of:
        idle = of["idle_conns"]
        hold("idle connections that did not open or live", idle["want"] - (idle["alive"] or 0), 0)
        hold("bytes for each idle connection", idle["rss_per_conn_bytes"], IDLE_BYTES_MAX)
    return worse


def main():
    options = arguments()
    for program, package in (("unshare", "util-linux"), ("ip", "iproute2"), ("iperf3", "iperf3")):
        if not shutil.which(program):
            raise SystemExit(f"{program} is missing (Debian package {package})")
    own_namespaces()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sh("ip", "link", "set", "lo", "up")
    # A veth pair with both ends here stands for an uplink, as not every kernel has the dummy device.
    sh("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
    sh("ip", "link", "set", "up1", "up")
    sh("ip", "addr", "add", f"{SERVER}/24", "dev", "up0")
    sh("ip", "link", "set", "up0", "up")
    sh("ip", "route", "add", "default", "via", "10.99.0.254", "dev", "up0")
    # Every address of it is answered here, though no interface has one.
    sh("ip", "route", "add", "local", f"{MANY}/16", "dev", "lo")
    for name, value in (("ip_local_port_range", "1024 65000"), ("tcp_tw_reuse", "1")):
        pathlib.Path(f"/proc/sys/net/ipv4/{name}").write_text(value)

    rows = []

    def emit(**figure):
        rows.append(figure)
        line = json.dumps(figure)
        print(line, flush=True)
        if options.json:
            with open(options.json, "a") as file:
                file.write(line + "\n")

    figures = {"guests": between_guests, "conn": connections, "miss": lambda *a: connections(*a, miss=True), "pending": pending,
               "idle": idle}
    targets = options.targets.split(",")
    if "passt" in targets and not shutil.which("passt"):
        print("passt is not installed; left out", file=sys.stderr)
        targets.remove("passt")
    for name in options.figures.split(","):
        if name == "bulk":
            bulk(options, targets, emit)
            continue
        for target in targets:
            figures[name](options, target, emit)

    print()
    print(f"{'target':10} {'figure':20} {'':18} value")
    for row in rows:
        which, value = "", ""
        if row["figure"].endswith("_ratio"):
            which = f"mtu {row['mtu']}, batch {row['batch']}"
            value = f"{row['cpu']['of_all']:.2f} of the CPU per byte ({row['cpu']['low']:.2f} to {row['cpu']['high']:.2f})"
        elif row["figure"].startswith("tcp_bulk"):
            which = f"mtu {row['mtu']}, batch {row['batch']}"
            value = f"{row['gbit']['median']:.2f} Gbit/s, {row['peer_cpu_s_per_gb']['median']:.2f} CPU s/GB"
        elif row["figure"] == "tcp_between_guests":
            which = f"mtu {row['mtu']}, {row['switch']}"
            value = f"{row['gbit']['median']:.2f} Gbit/s, {row['peer_cpu_s_per_gb']['median']:.2f} CPU s/GB, {row['retransmits']:.0f} retransmitted"
        elif row["figure"].startswith("tcp_connrate"):
            which, value = "64 in flight", f"{row['rate']['median']:.0f} /s, {row['peer_cpu_ms_per_conn']} CPU ms each, {row['fails']} failed, {row['misses']} misses"
        elif row["figure"] == "connect_while_pending":
            which = f"{row['questions']} by {row['asking']}"
            value = f"p50 {row['p50_us']['median']:.0f} us, p99 {row['p99_us']['median']:.0f} us, {row['fails']} failed"
        elif row["figure"] == "idle_conns":
            which = f"{row['opened']} held"
            value = f"{row['rss_idle_kb'] / 1024:.1f} MiB at rest, {row['rss_per_conn_bytes']} bytes each, {row['idle_cpu_pct']} % CPU"
        print(f"{row['target']:10} {row['figure']:20} {which:18} {value}")

    if options.check and (worse := beyond(rows)):
        raise SystemExit("\nworse than it is held to:\n  " + "\n  ".join(worse))


if __name__ == "__main__":
    main()
