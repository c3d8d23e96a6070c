//! What a command under `vnetctl run` cannot do, tried from inside: answer for itself, have somebody outside
//! act for it, or undo what hides them.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{ErrorKind, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use nix::sys::signal::Signal;
use vnet_tests::{Ended, Running, World, as_ordinary_user, binaries, eventually, http, staged};

const EACCES: i32 = nix::libc::EACCES;
const SERVER: &str = "http://203.0.113.10/";

/// Connects to each path in its arguments, and says what came of it: 0, or an errno.
const KNOCK: &str = r#"
import socket, sys
for path in sys.argv[1:]:
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(5)
    try:
        s.connect(path)
        print(0)
    except OSError as e:
        print(e.errno)
    s.close()
"#;

/// A server of the user's outside, which has been connected to or not.
struct Outside(UnixListener);

impl Outside {
    fn bind(path: &Path) -> Outside {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        Outside(listener)
    }

    fn is_untouched(&self) {
        let knocked = self.0.accept();
        assert!(
            knocked
                .as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
            "somebody connected: {knocked:?}"
        );
    }
}

fn python(world: &World, flags: &[&str], program: &str, arguments: &[&str]) -> Ended {
    let file = world.file("program.py", program);
    world
        .run(flags, &[&["python3", file.to_str().unwrap()], arguments].concat())
        .wait()
}

fn numbers(ended: &Ended) -> Vec<i32> {
    ended
        .stdout
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect()
}

#[test]
fn socket_bound_outside_cannot_be_connected_to_by_any_path() {
    staged(socket_bound_outside_cannot_be_connected_to_by_any_path, |world| {
        let home = world.work().with_file_name("home");
        let path = home.join(".editor/agent.sock");
        let server = Outside::bind(&path);
        UnixStream::connect(&path).expect("reachable outside");
        server.0.accept().unwrap();
        std::os::unix::fs::symlink(&path, world.work().join("link.sock")).unwrap();
        fs::hard_link(&path, world.work().join("hard.sock")).unwrap();
        let path = path.to_str().unwrap();
        let program = format!(
            r#"
import ctypes, os, socket, subprocess, sys
path = sys.argv[1]
os.link(path, "made.sock")
os.rename("made.sock", "renamed.sock")
held = os.open(os.path.dirname(path), os.O_RDONLY)
os.set_inheritable(held, True)
paths = [path, "link.sock", "./hard.sock", "renamed.sock", "../home/.editor/agent.sock", "/proc/self/root" + path,
    "/proc/%d/root%s" % (os.getpid(), path), "/proc/self/cwd/hard.sock", "/proc/1/root" + path]
sys.stdout.flush()
knock = """{KNOCK}"""
subprocess.run([sys.executable, "-c", knock, *paths, "/proc/self/fd/%d/agent.sock" % held], close_fds=False)
sys.stdout.flush()
# As root of a user namespace, with mounts of its own.
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000 | 0x20000) != 0 or os.mkdir("bound") or libc.mount(
        os.path.dirname(path).encode(), b"bound", None, 4096, None) != 0 or libc.chroot(b"bound") != 0:
    print("no mounts", ctypes.get_errno())
sys.argv = ["", "/agent.sock"]
exec(knock)
"#
        );
        let ended = python(world, &[], &program, &[path]);
        assert_eq!(ended.stderr, "", "{ended:?}");
        assert_eq!(numbers(&ended), [EACCES; 11], "{ended:?}");
        server.is_untouched();
    });
}

#[test]
fn socket_bound_after_the_start_cannot_be_connected_to() {
    staged(socket_bound_after_the_start_cannot_be_connected_to, |world| {
        let file = world.file("knock.py", KNOCK);
        let path = format!("/tmp/vnet-late-{}.sock", std::process::id());
        let script = format!(
            "echo up; while ! test -e {path}; do sleep 0.02; done; exec python3 {} {path}",
            file.display()
        );
        let mut run = world.run(&[], &["sh", "-c", &script]);
        run.prints("up");
        let server = Outside::bind(Path::new(&path));
        let ended = run.wait();
        fs::remove_file(&path).unwrap();
        assert_eq!(numbers(&ended), [EACCES], "{ended:?}");
        server.is_untouched();
    });
}

/// Races: while one thread connects, another changes the address in memory, and which socket its descriptor is.
const RACE: &str = r#"
import ctypes, os, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
outside = sys.argv[1].encode()
inside = b"own.sock"
server = socket.socket(socket.AF_UNIX)
server.bind(inside)
server.listen(1024)
def address(path):
    return (1).to_bytes(2, "little") + path + bytes(108 - len(path))
texts = [address(inside), address(outside)]
buffer = ctypes.create_string_buffer(texts[0], 110)
number = 100
over = False
def change_memory():
    n = 0
    while not over:
        n += 1
        ctypes.memmove(buffer, texts[n % 2], 110)
def change_descriptor():
    inet = socket.socket(socket.AF_INET)
    while not over:
        unix = socket.socket(socket.AF_UNIX)
        os.dup2(unix.fileno(), number)
        unix.close()
        os.dup2(inet.fileno(), number)
def drain():
    while not over:
        server.accept()[0].close()
sys.setswitchinterval(0.00005)
os.dup2(server.fileno(), number)
for work in (change_memory, change_descriptor, drain):
    threading.Thread(target=work, daemon=True).start()
done = {0: 0}
until = time.monotonic() + 6
while time.monotonic() < until:
    mine = socket.socket(socket.AF_UNIX)
    for fd in (mine.fileno(), number):
        result = libc.connect(fd, buffer, 110)
        errno = ctypes.get_errno() if result else 0
        done[errno] = done.get(errno, 0) + 1
    mine.close()
print(done.get(0) > 100, done.get(13, 0) > 100, done)
sys.stdout.flush()
os._exit(0)
"#;

#[test]
fn changing_the_arguments_of_a_connect_meanwhile_opens_nothing() {
    staged(
        changing_the_arguments_of_a_connect_meanwhile_opens_nothing,
        |world| {
            let path = world.work().join("o.sock");
            let server = Outside::bind(&path);
            let ended = python(world, &[], RACE, &[path.to_str().unwrap()]);
            assert_eq!(ended.code, 0, "{ended:?}");
            assert!(
                ended.stdout.starts_with("True True"),
                "the race was not run: {ended:?}"
            );
            server.is_untouched();
        },
    );
}

/// Every way in which a program's own sockets are used.
const OWN: &str = r#"
import asyncio, os, select, socket, subprocess, sys, threading, time
def check(name, holds):
    print(name, "ok" if holds else "FAILED")
    sys.stdout.flush()
a, b = socket.socketpair()
a.send(b"x")
check("pair", b.recv(1) == b"x")
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
a.send(b"xy")
check("seqpacket pair", b.recv(9) == b"xy")

server = socket.socket(socket.AF_UNIX)
server.bind("own.sock")
server.listen(1)
client = socket.socket(socket.AF_UNIX)
client.connect(os.path.abspath("own.sock"))
served = server.accept()[0]
served.send(b"hello")
check("blocking", client.recv(9) == b"hello")
check("names", client.getpeername() == "own.sock" and served.getsockname() == "own.sock")
uid = int.from_bytes(served.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], "little")
check("credentials", uid == os.getuid())
check("still blocking", client.getblocking() and os.get_blocking(client.fileno()))

client = socket.socket(socket.AF_UNIX)
client.setblocking(False)
client.connect("own.sock")
server.accept()
check("not blocking", not os.get_blocking(client.fileno()))

child = subprocess.run([sys.executable, "-c", "import socket; s = socket.socket(socket.AF_UNIX); s.connect('own.sock')"])
server.accept()
check("another process", child.returncode == 0)
os.rename("own.sock", "moved.sock")
client = socket.socket(socket.AF_UNIX)
client.connect("moved.sock")
server.accept()
directory = os.open(".", os.O_RDONLY)
client = socket.socket(socket.AF_UNIX)
client.connect("/proc/self/fd/%d/moved.sock" % directory)
server.accept()
check("by another name", True)

# A full queue: whoever may not wait is told so, others wait for room.
clients = []
try:
    while len(clients) < 10:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        client.connect("moved.sock")
        clients.append(client)
except BlockingIOError:
    pass
check("full", 0 < len(clients) < 10)
client = socket.socket(socket.AF_UNIX)
client.settimeout(None)
threading.Timer(0.3, lambda: [server.accept() for _ in clients]).start()
began = time.monotonic()
client.connect("moved.sock")
check("waited", time.monotonic() - began > 0.2)

client = socket.socket(socket.AF_UNIX)
client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, (0).to_bytes(8, "little") + (200000).to_bytes(8, "little"))
try:
    while True:
        c = socket.socket(socket.AF_UNIX)
        c.setblocking(False)
        c.connect("moved.sock")
        clients.append(c)
except BlockingIOError:
    pass
try:
    client.connect("moved.sock")
    check("timeout", False)
except BlockingIOError:
    check("timeout", True)

server.close()
client = socket.socket(socket.AF_UNIX)
try:
    client.connect("moved.sock")
    check("nobody there", False)
except ConnectionRefusedError:
    check("nobody there", True)
try:
    client.connect("absent.sock")
    check("no file", False)
except FileNotFoundError:
    check("no file", True)

server = socket.socket(socket.AF_UNIX)
server.bind("\0abstract")
server.listen()
client = socket.socket(socket.AF_UNIX)
client.connect("\0abstract")
check("abstract", server.accept() is not None)

async def echo():
    async def serve(reader, writer):
        writer.write(await reader.readline())
        writer.close()
    server = await asyncio.start_unix_server(serve, "aio.sock")
    reader, writer = await asyncio.open_unix_connection("aio.sock")
    writer.write(b"line\n")
    return await reader.readline()
check("asyncio", asyncio.run(echo()) == b"line\n")

server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
check("tcp", server.accept() is not None)
client = socket.socket()
client.setblocking(False)
check("tcp not blocking", client.connect_ex(server.getsockname()) == 115)
check("tcp connects", select.select([], [client], [], 5)[1] == [client] and client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0)
client = socket.socket()
address = server.getsockname()
server.close()
check("tcp refused", client.connect_ex(address) == 111)
udp = socket.socket(type=socket.SOCK_DGRAM)
udp.connect(("127.0.0.1", 9))
check("udp", udp.getpeername() == ("127.0.0.1", 9))
check("no descriptor", socket.socket().connect_ex(("127.0.0.1", 9)) == 111 and os.path.exists("."))
"#;

#[test]
fn sockets_of_a_commands_own_work_as_ever() {
    staged(sockets_of_a_commands_own_work_as_ever, |world| {
        let ended = python(world, &[], OWN, &[]);
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(!ended.stdout.contains("FAILED"), "{ended:?}");
        assert_eq!(ended.stdout.lines().count(), 22, "{ended:?}");
    });
}

#[test]
fn datagram_sockets_and_io_uring_do_not_exist_but_for_pairs() {
    staged(
        datagram_sockets_and_io_uring_do_not_exist_but_for_pairs,
        |world| {
            let path = world.work().join("datagrams.sock");
            let outside = UnixDatagram::bind(&path).unwrap();
            outside.set_nonblocking(true).unwrap();
            let program = r#"
import ctypes, os, socket, sys
DGRAM, RAW, FLAGS = socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
def errno(what):
    try:
        what()
        return 0
    except OSError as e:
        return e.errno
for kind in (DGRAM, RAW, DGRAM | FLAGS):
    print(errno(lambda: socket.socket(socket.AF_UNIX, kind)))
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall(425, 8, ctypes.create_string_buffer(256))
print(ctypes.get_errno())
def pair(kind):
    fds = (ctypes.c_int * 2)()
    assert libc.socketpair(1, kind, 0, fds) == 0, ctypes.get_errno()
    return [socket.socket(fileno=fd) for fd in fds]
for kind in (DGRAM, RAW):
    a, b = pair(kind)
    a.send(b"one")
    a.send(b"two")
    assert (b.recv(9), b.recv(9)) == (b"one", b"two")
    assert os.get_inheritable(a.fileno()) and os.get_blocking(b.fileno())
    # An address is not looked at: the other end has it.
    a.sendto(b"three", sys.argv[1])
    a.sendmsg([b"four"], [], 0, sys.argv[1])
    assert (b.recv(9), b.recv(9)) == (b"three", b"four")
    print(errno(lambda: a.connect(sys.argv[1])) != 0)
a, b = pair(DGRAM | FLAGS)
assert not os.get_inheritable(a.fileno()) and not os.get_blocking(b.fileno())
print(errno(lambda: b.recv(9)))
libc.socketpair(1, DGRAM, 0, 8)
print(ctypes.get_errno())
"#;
            let ended = python(world, &[], program, &[path.to_str().unwrap()]);
            let unknown = nix::libc::ESOCKTNOSUPPORT;
            assert_eq!(
                ended.stdout,
                format!(
                    "{unknown}\n{unknown}\n{unknown}\n{}\nTrue\nTrue\n{}\n{}\n",
                    nix::libc::ENOSYS,
                    nix::libc::EAGAIN,
                    nix::libc::EFAULT
                ),
                "{ended:?}"
            );
            let heard = outside.recv(&mut [0; 9]);
            assert!(heard.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
        },
    );
}

#[test]
fn own_sockets_and_waiting_connects_are_bounded() {
    staged(own_sockets_and_waiting_connects_are_bounded, |world| {
        let program = r#"
import errno, os, socket, sys, threading, time
SOCKETS, WAITING = 1024, 256
def listening(path):
    s = socket.socket(socket.AF_UNIX)
    s.bind(path)
    s.listen(1)
    return s
for n in range(SOCKETS):
    listening("s%d" % n).close()
try:
    listening("more")
    print("no limit")
except OSError as e:
    print(errno.errorcode[e.errno])
for n in range(SOCKETS):
    os.unlink("s%d" % n)
server = listening("again")
# Of files that are gone nothing is kept; a full queue has every further connect wait.
for n in range(2):
    c = socket.socket(socket.AF_UNIX)
    c.connect("again")
threading.stack_size(65536)
results = []
def wait():
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect("again")
        results.append("connected")
    except OSError as e:
        results.append(errno.errorcode[e.errno])
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
for n in range(WAITING + 1):
    threading.Thread(target=wait, daemon=True).start()
while not results:
    time.sleep(0.01)
print(results)
for n in range(WAITING + 2):
    server.accept()[0].close()
while len(results) <= WAITING:
    time.sleep(0.01)
print(results.count("connected"))
"#;
        let ended = python(world, &[], program, &[]);
        assert_eq!(ended.stdout, "ENOBUFS\n['ENOBUFS']\n256\n", "{ended:?}");
    });
}

#[test]
fn standard_stream_that_is_a_socket_leads_nowhere_else() {
    staged(standard_stream_that_is_a_socket_leads_nowhere_else, |world| {
        let unconnected = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut command = world.command(&["run", "--", "true"]);
        command.stdin(OwnedFd::from(unconnected));
        let ended = Running::start_with_input(command).wait();
        assert_eq!(ended.code, 125, "{ended:?}");
        assert!(ended.stderr.contains("stdin is a socket"), "{ended:?}");

        // A stream is passed on, and cannot be connected anew.
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(server.local_addr().unwrap()).unwrap();
        server.accept().unwrap().0.write_all(b"hello\n").unwrap();
        let program = "import ctypes, socket, sys\nprint(sys.stdin.readline().strip())\n\
                       libc = ctypes.CDLL(None, use_errno=True)\n\
                       print(libc.connect(0, bytes(16), 16), ctypes.get_errno())\n";
        let file = world.file("program.py", program);
        let mut command = world.command(&["run", "--", "python3", file.to_str().unwrap()]);
        command.stdin(OwnedFd::from(client));
        let ended = Running::start_with_input(command).wait();
        assert_eq!(ended.stdout, "hello\n-1 13\n", "{ended:?}");
    });
}

#[test]
fn socket_that_is_opened_is_that_one_and_no_other() {
    staged(socket_that_is_opened_is_that_one_and_no_other, |world| {
        let agent = world.work().join("agent.sock");
        let listener = UnixListener::bind(&agent).unwrap();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let _ = client.unwrap().write_all(b"agent");
            }
        });
        let other = world.work().join("other.sock");
        let server = Outside::bind(&other);
        let program = r#"
import os, socket, sys
def knock(path):
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(path)
        return s.recv(9)
    except OSError as e:
        return e.errno
agent, other = sys.argv[1:]
print(knock(agent), knock(other))
os.rename(agent, "moved.sock")
os.rename(other, agent)
print(knock(agent), knock("moved.sock"))
"#;
        let (agent, other) = (agent.to_str().unwrap(), other.to_str().unwrap());
        let ended = python(world, &["--socket", agent], program, &[agent, other]);
        assert_eq!(ended.stdout, "b'agent' 13\n13 b'agent'\n", "{ended:?}");
        server.is_untouched();

        for (wrong, why) in [
            ("/nonexistent.sock", "No such file"),
            ("/etc/passwd", "not a socket"),
            (world.control_socket().to_str().unwrap(), "vnet's own"),
        ] {
            let ended = world.run(&["--socket", wrong], &["true"]).wait();
            assert_eq!(ended.code, 125, "{ended:?}");
            assert!(
                ended.stderr.contains(why) && ended.stderr.contains(wrong),
                "{ended:?}"
            );
        }
    });
}

#[test]
fn socket_below_a_hidden_directory_can_be_opened() {
    staged(socket_below_a_hidden_directory_can_be_opened, |world| {
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, None::<&str>)
            .expect("a stage may mount");
        let paths = [
            "/run/dbus/system_bus_socket",
            "/run/docker.sock",
            "/run/systemd/private",
        ];
        let servers = paths.map(|path| Outside::bind(Path::new(path)));
        let flags = ["--socket", paths[0], "--socket", paths[1]];
        let ended = python(world, &flags, KNOCK, &paths);
        assert_eq!(numbers(&ended)[..2], [0, 0], "{ended:?}");
        assert_ne!(numbers(&ended)[2], 0, "{ended:?}");
        assert!(servers[0].0.accept().is_ok() && servers[1].0.accept().is_ok());
        servers[2].is_untouched();
    });
}

#[test]
fn nobody_outside_acts_for_the_command() {
    staged(nobody_outside_acts_for_the_command, |world| {
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, None::<&str>)
            .expect("a stage may mount");
        let runtime = world.runtime_dir();
        let home = world.work().with_file_name("home");
        let paths = [
            // A systemd user run, by either door; the system's.
            runtime.join("systemd/private"),
            runtime.join("bus"),
            "/run/systemd/private".into(),
            "/run/dbus/system_bus_socket".into(),
            // Container engines, in their usual places and in one that nobody lists.
            "/run/docker.sock".into(),
            runtime.join("podman/podman.sock"),
            home.join(".engine/run/api.sock"),
            // The system's own resolver.
            "/run/systemd/resolve/io.systemd.Resolve".into(),
        ];
        let servers = paths.each_ref().map(|path| Outside::bind(path));
        let arguments = paths.each_ref().map(|path| path.to_str().unwrap());
        let ended = python(world, &[], KNOCK, &arguments);
        let numbers = numbers(&ended);
        assert_eq!(numbers.len(), paths.len(), "{ended:?}");
        assert!(numbers.iter().all(|errno| *errno != 0), "{ended:?}");
        for server in &servers {
            server.is_untouched();
        }
    });
}

#[test]
fn command_cannot_approve_its_own_request() {
    staged(command_cannot_approve_its_own_request, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let vnetctl = binaries::binary("vnetctl");
        let vnetctl = vnetctl.display();
        let script = format!(
            "curl -sS {SERVER} & echo up; read id; \
             {vnetctl} approve $id; echo $?; {vnetctl} allow any 0.0.0.0/0 --all-vms; echo $?; \
             {vnetctl} --server unix://{} approve $id; echo $?; kill $!; exit 0",
            world.control_socket().display()
        );
        let mut command = world.command(&["run", "--secure-mode", "--", "sh", "-c", &script]);
        let (input, mut tell) = std::io::pipe().unwrap();
        command.stdin(input);
        let mut run = Running::start_with_input(command);
        run.prints("up");
        let id = world.first_pending_id();
        writeln!(tell, "{id}").unwrap();
        let ended = run.wait();
        let codes = numbers(&ended);
        assert_eq!(codes.len(), 3, "{ended:?}");
        assert!(codes.iter().all(|code| *code != 0), "{ended:?}");
        assert_eq!(server.connections(), 0);
        assert!(world.list(&["grants", "list"]).is_empty());
    });
}

#[test]
fn command_that_asks_for_the_controlplane_is_told_that_it_is_inside_a_run() {
    staged(
        command_that_asks_for_the_controlplane_is_told_that_it_is_inside_a_run,
        |world| {
            let vnetctl = binaries::binary("vnetctl");
            let vnetctl = vnetctl.display();
            let socket = world.control_socket();
            for server in [String::new(), format!("--server unix://{}", socket.display())] {
                let ended = world.script(&[], &format!("{vnetctl} {server} vm list"));
                assert_eq!(ended.code, 1, "{server}: {ended:?}");
                assert!(
                    ended.stderr.contains("error: this is inside a vnetctl run"),
                    "{server}: {ended:?}"
                );
            }
        },
    );
}

#[test]
fn command_cannot_signal_the_controlplane() {
    staged(command_cannot_signal_the_controlplane, |world| {
        let policy = world.file("policy.yaml", "defaultAction: deny\n");
        let mut command = world.program("vnet-controlplane");
        command.args(["--network-policy", policy.to_str().unwrap()]);
        let mut controlplane = Running::start(command);
        eventually("it serves", || world.control_socket().exists());
        // What it would take up with a SIGHUP.
        fs::write(&policy, "defaultAction: allow\n").unwrap();
        let script = format!(
            "trap '' HUP TERM; kill -HUP {0}; echo $?; kill -TERM {0}; echo $?; kill -HUP -1; kill -TERM -1; exit 0",
            controlplane.pid()
        );
        let ended = world.script(&[], &script);
        assert_eq!(numbers(&ended), [1, 1], "{ended:?}");
        assert!(!controlplane.has_ended());
        let shown = world.vnetctl(&["policy", "show"]);
        assert!(shown.contains("defaultAction: deny"), "{shown}");
        controlplane.signal(Signal::SIGHUP);
        eventually("from outside it is heard", || {
            world
                .vnetctl(&["policy", "show"])
                .contains("defaultAction: allow")
        });
    });
}

/// Tries to take away every mount, and to make each writable: as it is, and as root of a user namespace.
const UNMOUNT: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def points():
    return [line.split()[4] for line in open("/proc/self/mountinfo")]
def attack(who):
    before = points()
    undone = []
    for point in reversed(before):
        if libc.umount2(point.encode(), 2) == 0:
            undone.append("umount " + point)
        if libc.mount(None, point.encode(), None, 32 | 4096, None) == 0 and os.statvfs(point).f_flag & 1 == 0 and point in sealed:
            undone.append("remount " + point)
        if libc.mount(b"/", b"/mnt", None, 4096, None) == 0:
            undone.append("bind without what is mounted below")
            libc.umount2(b"/mnt", 2)
    print(who, len(before) > 10, undone, before == points())
sealed = {line.split()[4] for line in open("/proc/self/mountinfo") if line.split()[5].startswith("ro")}
attack("user")
if libc.unshare(0x10000000 | 0x20000) != 0:
    print("no namespaces", ctypes.get_errno())
attack("root")
for path in sys.argv[1:]:
    print(os.listdir(path) if os.path.isdir(path) else os.path.getsize(path))
"#;

#[test]
fn no_mount_can_be_undone() {
    staged(no_mount_can_be_undone, |world| {
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, None::<&str>)
            .expect("a stage may mount");
        let _servers = [
            "/run/docker.sock",
            "/run/systemd/private",
            "/run/dbus/system_bus_socket",
        ]
        .map(|path| Outside::bind(Path::new(path)));
        let bus = world.runtime_dir().join("bus");
        let _bus = Outside::bind(&bus);
        let hidden = [world.runtime_dir(), world.state_dir().join("vnet")];
        let hidden = hidden.each_ref().map(|path| path.to_str().unwrap());
        let ended = python(world, &[], UNMOUNT, &hidden);
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!(
            ended.stdout, "user True [] True\nroot True [] True\n[]\n[]\n",
            "{ended:?}"
        );
    });
}

#[test]
fn state_and_programs_of_vnet_cannot_be_changed_or_replaced() {
    staged(
        state_and_programs_of_vnet_cannot_be_changed_or_replaced,
        |world| {
            world.vnetctl(&["vm", "list"]);
            let state = world.state_dir().join("vnet");
            let store = state.join("state.db");
            assert!(store.exists());
            // Programs where a user keeps them, the way there by a link.
            let home = world.work().with_file_name("home");
            fs::create_dir_all(home.join("tools/bin")).unwrap();
            std::os::unix::fs::symlink("tools", home.join("link")).unwrap();
            let program = home.join("link/bin/vnetctl");
            for name in ["vnetctl", "vnet-controlplane", "vnet-dataplane"] {
                fs::copy(binaries::binary(name), program.with_file_name(name)).unwrap();
            }
            let before = fs::read(&program).unwrap().len();
            let script = format!(
                r#"
world=$(dirname "$PWD")
no() {{ "$@" 2>/dev/null && echo "done: $*"; true; }}
no sh -c 'echo x >> "$1"' - {store}
no sh -c 'mkdir -p "$1"; echo x > "$1/state.db"' - {state}
no rm -rf {state}
no mv {state} {state}.old
no mv "$XDG_STATE_HOME" "$world/state.old"
no mv "$XDG_RUNTIME_DIR" "$world/run.old"
no mv "$XDG_RUNTIME_DIR/vnet" "$world/vnet.old"
no mv "$world" "$world.old"
no sh -c 'echo x >> "$1"' - {program}
no cp /bin/true {program}
no rm -f {program}
no mv /bin/sh {program}
no ln -sf /bin/true {program}
no mv "$HOME/tools/bin" "$HOME/tools/old"
no mv "$HOME/tools" "$HOME/old"
no mv "$HOME/link" "$HOME/oldlink"
no rm -f "$HOME/link"
no mv "$HOME" "$world/oldhome"
no touch "$HOME/tools/bin/vnet-dataplane"
touch "$HOME/own" "$HOME/tools/bin/own" && echo writable
"#,
                store = store.display(),
                state = state.display(),
                program = program.display()
            );
            let mut command = world.program(&program);
            command.args(["run", "--", "sh", "-c", &script]);
            let ended = Running::start(command).wait();
            assert_eq!(ended.stdout, "writable\n", "{ended:?}");
            assert!(fs::read(&store).unwrap().starts_with(b"SQLite format 3\0"));
            assert_eq!(fs::read(&program).unwrap().len(), before);
            assert!(home.join("tools/bin/own").exists() && home.join("own").exists());
            assert!(fs::read_link(home.join("link")).is_ok());
            fs::remove_dir_all(home.join("tools")).unwrap();
        },
    );
}

#[test]
fn write_makes_all_else_read_only() {
    staged(write_makes_all_else_read_only, |world| {
        let work = world.work();
        let home = world.work().with_file_name("home");
        for directory in ["out/deep", "src"] {
            fs::create_dir_all(work.join(directory)).unwrap();
        }
        let log = world.file("build.log", "");
        world.file("src/main.c", "int main;");
        let beside = format!("/tmp/vnet-beside-{}", std::process::id());
        fs::write(&beside, "").unwrap();
        let script = format!(
            r#"
for f in "$PWD/new" "$PWD/src/main.c" "$HOME/.bashrc" /etc/new /dev/shm/own /tmp/own /var/tmp/own "$PWD/out/deep/new" \
    "$PWD/build.log" "$XDG_RUNTIME_DIR/new" /usr/new; do
    if (echo x >> "$f") 2>/dev/null; then echo "yes $f"; else echo "no $f"; fi
done
cat src/main.c; echo
ls {beside} 2>/dev/null
(mv out elsewhere || rm build.log) 2>/dev/null; ls -d out build.log
cat /dev/null > /dev/null && echo null; sh -c 'exit 3'; echo $?
"#
        );
        let ended = world
            .run(&["--write", "out", log.to_str().unwrap()], &["sh", "-c", &script])
            .wait();
        fs::remove_file(&beside).unwrap();
        let (work, home, runtime) = (work.display(), home.display(), world.runtime_dir());
        let expected = format!(
            "no {work}/new\nno {work}/src/main.c\nno {home}/.bashrc\nno /etc/new\nyes /dev/shm/own\nyes /tmp/own\n\
             yes /var/tmp/own\nyes {work}/out/deep/new\nyes {work}/build.log\nno {}/new\nno /usr/new\nint main;\n\
             build.log\nout\nnull\n3\n",
            runtime.display()
        );
        assert_eq!(ended.stdout, expected, "{ended:?}");
        assert_eq!(
            fs::read_to_string(world.work().join("out/deep/new")).unwrap(),
            "x\n"
        );
        assert_eq!(fs::read_to_string(&log).unwrap(), "x\n");
        for gone in ["/tmp/own", "/dev/shm/own", "/var/tmp/own"] {
            assert!(!Path::new(gone).exists(), "{gone} was the host's");
        }
        for (wrong, why) in [("absent", "make it first"), ("/", "nothing read-only")] {
            let ended = world.run(&["--write", wrong], &["true"]).wait();
            assert_eq!(ended.code, 125, "{ended:?}");
            assert!(ended.stderr.contains(why), "{ended:?}");
        }
    });
}

#[test]
fn ordinary_users_command_is_as_confined() {
    if !as_ordinary_user(&ordinary_users_command_is_as_confined) {
        return;
    }
    staged(ordinary_users_command_is_as_confined, |world| {
        let path = world.work().join("o.sock");
        let server = Outside::bind(&path);
        let own = "import socket; s = socket.socket(socket.AF_UNIX); s.bind('own.sock'); s.listen(); \
                   c = socket.socket(socket.AF_UNIX); c.connect('own.sock'); print(7)";
        let program = format!("{own}{KNOCK}");
        let ended = python(world, &[], &program, &[path.to_str().unwrap()]);
        assert_eq!(numbers(&ended), [7, EACCES], "{ended:?}");
        server.is_untouched();
        fs::create_dir(world.work().join("out")).unwrap();
        let ended = world.script(&["--write", "out"], "touch out/new; touch new; echo $?");
        assert_eq!(numbers(&ended), [1], "{ended:?}");
        assert!(world.work().join("out/new").exists());
    });
}
