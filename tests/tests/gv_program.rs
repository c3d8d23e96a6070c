//! `gvproxy` as its callers start it: the order of what it does, its files, its log and notifications, and how it ends.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use vnet_tests::{Controlplane, Ended, FIRST_MAC, Running, World, eventually, http, notices, staged};

/// What a clean end may take, with some room for a busy machine.
const END: Duration = Duration::from_secs(1);

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Ends it, and how long that took.
fn end(running: Running, signal: Signal) -> (vnet_tests::Ended, Duration) {
    running.signal(signal);
    let began = Instant::now();
    let ended = running.wait();
    (ended, began.elapsed())
}

#[test]
fn what_podman_types_serves_its_guest_and_ends_without_a_trace() {
    staged(
        what_podman_types_serves_its_guest_and_ends_without_a_trace,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let [socket, pid, log] =
                ["qemu.sock", "gv.pid", "gv.log"].map(|name| world.runtime_dir().join(name));
            fs::write(&log, "of the last time\n").unwrap();
            let qemu = format!("unix://{}", socket.display());
            let gvproxy = Running::start(world.gvproxy(&[
                "-debug",
                "-mtu",
                "1500",
                "-ssh-port",
                "40222",
                "-listen-qemu",
                &qemu,
                "-pid-file",
                &text(&pid),
                "-log-file",
                &text(&log),
            ]));
            eventually("its socket is there", || socket.exists());
            assert_eq!(fs::read_to_string(&pid).unwrap(), gvproxy.pid().to_string());
            assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

            let fetched = world
                .guest(&socket, &["curl", "-sS", "http://203.0.113.10/"])
                .wait();
            assert_eq!(fetched.stdout, "this is 203.0.113.10:80 at /\n", "{fetched:?}");
            assert_eq!(server.connections(), 1);
            // The host's own loopback, as under gvproxy.
            let own = http(world.host(), "127.0.0.1:8099");
            let fetched = world
                .guest(&socket, &["curl", "-sS", "http://192.168.127.254:8099/"])
                .wait();
            assert_eq!(fetched.code, 0, "{fetched:?}");
            assert_eq!(own.connections(), 1);

            // An idle guest is there when it ends.
            let _idle = world.guest(
                &socket,
                &["sh", "-c", "ping -c 1 -W 5 192.168.127.1; exec sleep 60"],
            );
            eventually("the guest is there", || !world.list(&["vm", "list"]).is_empty());
            let (ended, took) = end(gvproxy, Signal::SIGTERM);
            assert_eq!(
                (ended.code, &*ended.stdout, &*ended.stderr),
                (0, "", ""),
                "{ended:?}"
            );
            assert!(took < END, "{took:?}");
            assert!(!socket.exists() && !pid.exists(), "its files are gone");
            let log = fs::read_to_string(&log).unwrap();
            let order = [
                "level=info msg=\"gvproxy version v",
                "level=info msg=\"waiting for clients...\"",
                "level=info msg=\"gvproxy exiting: signal caught\"",
            ]
            .map(|what| log.find(what).unwrap_or_else(|| panic!("no {what}: {log}")));
            assert!(order.is_sorted(), "{log}");
            assert!(log.lines().all(|line| line.starts_with("time=\"")), "{log}");
        },
    );
}

/// Names of VMs that have spoken.
fn names(world: &World) -> Vec<String> {
    let vms = world.list(&["vm", "list"]);
    let spoken = vms
        .iter()
        .filter(|vm| vm["mac"].as_str().is_some_and(|mac| !mac.is_empty()));
    let mut names: Vec<_> = spoken
        .filter_map(|vm| Some(vm["name"].as_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

#[test]
fn no_guest_has_the_place_of_another_sockets_and_who_is_called_otherwise_is_told() {
    staged(
        no_guest_has_the_place_of_another_sockets_and_who_is_called_otherwise_is_told,
        |world| {
            const STAY: [&str; 3] = ["sh", "-c", "ping -c 1 -W 5 192.168.127.1; exec sleep 60"];
            let start = |number: usize, flags: &[&str]| {
                let socket = world.runtime_dir().join(format!("qemu{number}.sock"));
                let qemu = format!("unix://{}", socket.display());
                let mut gvproxy =
                    world.gvproxy(&[&["-ssh-port", "-1", "-listen-qemu", &qemu], flags].concat());
                gvproxy.env("VNET_VM", "web");
                let mut gvproxy = Running::start(gvproxy);
                gvproxy.complains("waiting for clients");
                (gvproxy, socket)
            };
            let listen = world.runtime_dir().join("listen.sock");
            let (first, socket) = start(1, &["-listen", &format!("unix://{}", listen.display())]);
            let mut load = world.load();
            load.args(["guest", "--framing", "connect", "--socket"])
                .arg(&listen);
            load.arg("--").args(STAY);
            // Whoever comes to the other socket first does not have the hypervisor's name, which is free.
            let _other = Running::start(load);
            eventually("the one at -listen is there", || names(world) == ["web-listen"]);
            let _guest = world.guest(&socket, &STAY);
            eventually("both are there", || names(world) == ["web", "web-listen"]);

            // Another one's, by the same name.
            let (mut second, socket) = start(2, &[]);
            let _guest = world.guest(&socket, &STAY);
            let log = second.complains("level=warning msg=\"another VM is called web, so this one is web-2");
            assert!(
                log.contains("name it with VNET_VM=NAME, or with vm: NAME in /"),
                "{log}"
            );
            // Of this one's, a further guest has what its place is called.
            let mac = ["--mac", "02:00:00:00:00:07"];
            let mut load = world.load();
            load.arg("guest")
                .args(mac)
                .arg("--socket")
                .arg(world.runtime_dir().join("qemu1.sock"));
            load.arg("--").args(STAY);
            let _further = Running::start(load);
            eventually("all are there", || names(world).len() == 4);
            assert!(
                !first.stderr().contains("another VM is called web,"),
                "{}",
                first.stderr()
            );
        },
    );
}

/// A program, in a network namespace of its own.
fn apart(world: &World, command: &Command) -> Ended {
    let mut apart = world.program("unshare");
    apart
        .arg("-n")
        .arg(command.get_program())
        .args(command.get_args());
    Running::start(apart).wait()
}

#[test]
fn in_another_network_namespace_than_the_controlplane_it_says_so_and_ends() {
    staged(
        in_another_network_namespace_than_the_controlplane_it_says_so_and_ends,
        |world| {
            let controlplane = Controlplane::start(world, Signal::SIGTERM);
            let why = "this process is in another network namespace than the controlplane";
            let [notices, socket] = ["n.sock", "qemu.sock"].map(|name| world.runtime_dir().join(name));
            let listener = UnixListener::bind(&notices).unwrap();
            let url = |path: &Path| format!("unix://{}", path.display());
            let words = ["-listen-qemu", &url(&socket), "-notification", &url(&notices)];
            let ended = apart(world, &world.gvproxy(&words));
            assert_eq!(ended.code, 1, "{ended:?}");
            assert!(
                ended.stderr.contains(why) && ended.stderr.contains("XDG_RUNTIME_DIR"),
                "{ended:?}"
            );
            listener.set_nonblocking(true).unwrap();
            assert!(listener.accept().is_err(), "it was not ready");

            let listed = apart(world, &world.command(&["vm", "list"]));
            assert!(listed.code == 1 && listed.stderr.contains(why), "{listed:?}");
            // And a dataplane, which no gvproxy asked before.
            let mut dataplane = world.program("vnet-dataplane");
            dataplane.args([
                "--controlplane",
                controlplane.session_url(),
                "--listen-qemu",
                &url(&socket),
            ]);
            let refused = apart(world, &dataplane);
            assert!(refused.code != 0 && refused.stderr.contains(why), "{refused:?}");
            // Its own are served all the while.
            world.vnetctl(&["vm", "list"]);
        },
    );
}

#[test]
fn ready_is_not_told_before_the_dataplane_has_its_session() {
    staged(ready_is_not_told_before_the_dataplane_has_its_session, |world| {
        let at = |name: &str| world.runtime_dir().join(name);
        let url = |path: &Path| format!("unix://{}", path.display());
        let _controlplane = Controlplane::start(world, Signal::SIGTERM);
        // The API is where a session is not.
        let [notices, control, session] = ["n.sock", "control.sock", "session.sock"].map(at);
        symlink(world.control_socket(), &control).unwrap();
        let listener = UnixListener::bind(&notices).unwrap();
        listener.set_nonblocking(true).unwrap();
        let words = [
            "-listen-qemu",
            &url(&at("qemu.sock")),
            "-notification",
            &url(&notices),
        ];
        let mut gvproxy = world.gvproxy(&words);
        gvproxy.env("VNET_SERVER", url(&control));
        let mut gvproxy = Running::start(gvproxy);
        gvproxy.complains("the dataplane has no session with the controlplane");
        assert!(listener.accept().is_err(), "nobody is told");
        symlink(world.control_socket().with_file_name("session.sock"), session).unwrap();
        eventually("it is ready", || listener.accept().is_ok());
    });
}

#[test]
fn a_busy_guest_keeps_it_no_longer_than_an_idle_one() {
    staged(a_busy_guest_keeps_it_no_longer_than_an_idle_one, |world| {
        let _sink = vnet_tests::tcp(world.internet(), "203.0.113.10:9", |mut stream, _| {
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let socket = world.runtime_dir().join("qemu.sock");
        let gvproxy = Running::start(world.gvproxy(&[
            "-ssh-port",
            "-1",
            "-listen-qemu",
            &format!("unix://{}", socket.display()),
        ]));
        eventually("its socket is there", || socket.exists());
        let _guest = world.guest(
            &socket,
            &["sh", "-c", "cat /dev/zero | socat - tcp:203.0.113.10:9"],
        );
        eventually("it is busy", || {
            world
                .list(&["flows", "list"])
                .iter()
                .any(|flow| flow["bytesUp"].as_str().is_some_and(|bytes| bytes.len() > 6))
        });
        let (ended, took) = end(gvproxy, Signal::SIGINT);
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(took < END, "{took:?}");
        assert!(!socket.exists());
    });
}

#[test]
fn a_controlplane_that_hangs_keeps_it_no_longer() {
    staged(a_controlplane_that_hangs_keeps_it_no_longer, |world| {
        let (gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1", "-secure-mode"]);
        let script = "ping -c 1 -W 5 192.168.127.1; curl -m 60 http://203.0.113.10/; sleep 60";
        let _guest = world.guest_script(&socket, script);
        eventually("it is asked about", || {
            !world.list(&["pending", "list"]).is_empty()
        });
        let [controlplane] = world.processes("__controlplane")[..] else {
            panic!("there is one controlplane");
        };
        let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(controlplane), signal);
        signal(Signal::SIGSTOP).unwrap();
        let (ended, took) = end(gvproxy, Signal::SIGTERM);
        signal(Signal::SIGCONT).unwrap();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(took < END, "{took:?}");
        assert!(!socket.exists());
    });
}

#[test]
fn what_cannot_be_is_said_and_the_status_tells() {
    staged(what_cannot_be_is_said_and_the_status_tells, |world| {
        let run = |words: &[&str]| Running::start(world.gvproxy(words)).wait();
        let version = run(&["-version"]);
        assert_eq!(version.code, 0);
        assert!(version.stdout.starts_with("gvproxy version v"), "{version:?}");

        let unknown = run(&["-lsten", "x"]);
        assert_eq!(unknown.code, 2, "{unknown:?}");
        assert!(
            unknown
                .stderr
                .starts_with("flag provided but not defined: -lsten (did you mean -listen?)\nUsage of "),
            "{unknown:?}"
        );
        let help = run(&["--help"]);
        assert_eq!(help.code, 0, "{help:?}");

        let config = world.file("c.yaml", "stack: {mtu: large}\n");
        let wrong = run(&["-config", &text(&config)]);
        assert_eq!(wrong.code, 1, "{wrong:?}");
        assert!(
            wrong.stderr.contains("level=fatal msg=\"") && wrong.stderr.contains(":1:14: stack.mtu"),
            "{wrong:?}"
        );
        // Also where whoever did not type it looks; once, where both are the same.
        let log = world.runtime_dir().join("gv.log");
        let wrong = run(&["-config", &text(&config), "-log-file", &text(&log)]);
        assert_eq!(fs::read_to_string(&log).unwrap(), wrong.stderr);
        assert!(wrong.stderr.contains(":1:14: stack.mtu"), "{wrong:?}");
        let wrong = run(&["-config", &text(&config), "-log-file", "/dev/stderr"]);
        assert_eq!(wrong.stderr.matches(":1:14: stack.mtu").count(), 1, "{wrong:?}");

        // A forward whose port is taken, as of a second one with the default port for SSH.
        let _taken = http(world.host(), "127.0.0.1:2222");
        let socket = world.runtime_dir().join("q.sock");
        let pid = world.runtime_dir().join("p.pid");
        let busy = run(&[
            "-listen-qemu",
            &format!("unix://{}", socket.display()),
            "-pid-file",
            &text(&pid),
        ]);
        assert_eq!(busy.code, 1, "{busy:?}");
        // Once, and in the words of who typed it.
        let said = "-ssh-port: tcp 127.0.0.1:2222 is already in use by ";
        assert!(busy.stderr.contains(said), "{busy:?}");
        assert_eq!(busy.stderr.matches("127.0.0.1:2222").count(), 1, "{busy:?}");
        assert!(!busy.stderr.contains("--publish"), "{busy:?}");
        assert!(!socket.exists() && !pid.exists(), "nothing is left");

        let nowhere = world.work().join("nowhere");
        for flag in ["-log-file", "-pid-file"] {
            let (file, url) = (nowhere.join("file"), format!("unix://{}", socket.display()));
            let ended = run(&["-ssh-port", "-1", "-listen-qemu", &url, flag, &text(&file)]);
            assert_eq!(ended.code, 1, "{ended:?}");
            let told = format!(
                "{flag}: {} cannot be made, as its directory is not there; run: mkdir -p {}",
                file.display(),
                nowhere.display()
            );
            assert!(ended.stderr.contains(&told), "{ended:?}");
        }

        let link = world.runtime_dir().join("link.pcap");
        symlink("nothing", &link).unwrap();
        let services = "tcp://127.0.0.1:2222";
        for (flags, told) in [
            (
                ["-pcap", &text(&link)],
                format!("-pcap {} is a link that leads to nothing", link.display()),
            ),
            (["-services", services], format!("(pid {})", std::process::id())),
        ] {
            let url = format!("unix://{}", socket.display());
            let refused = run(&[&["-ssh-port", "-1", "-listen-qemu", &url], &flags[..]].concat());
            assert_eq!(refused.code, 1, "{refused:?}");
            assert_eq!(refused.stderr.matches("level=fatal").count(), 1, "{refused:?}");
            assert!(refused.stderr.contains(&told), "{told}: {refused:?}");
            let remedies = refused
                .stderr
                .matches("; stop it, or listen elsewhere: it is ")
                .count();
            assert_eq!(remedies, usize::from(flags[0] == "-services"), "{refused:?}");
        }
    });
}

/// `gvproxy` or `vnetctl` by a shell that lowers its limit of open files first, the soft one or both.
fn limited(world: &World, command: &Command, limit: &str) -> Command {
    let mut shell = world.program("sh");
    shell
        .args(["-c", &format!("ulimit {limit}; exec \"$0\" \"$@\"")])
        .arg(command.get_program())
        .args(command.get_args());
    shell
}

#[test]
fn too_few_open_files_are_one_error_before_anything_is_started() {
    staged(
        too_few_open_files_are_one_error_before_anything_is_started,
        |world| {
            let socket = world.runtime_dir().join("q.sock");
            let url = format!("unix://{}", socket.display());
            for (command, said) in [
                (
                    world.gvproxy(&["-listen-qemu", &url]),
                    "a VM and 1 forwarded port (at least 102)",
                ),
                (
                    world.gvproxy(&["-listen-qemu", &url, "-ssh-port", "-1"]),
                    "a VM (at least 100)",
                ),
                (
                    world.command(&["up", "--listen-qemu", &url]),
                    "a VM (at least 100)",
                ),
            ] {
                let ended = Running::start(limited(world, &command, "-n 64")).wait();
                assert_eq!(ended.code, 1, "{ended:?}");
                let told =
                    format!("the limit of open files is 64, too low for {said}; raise it: ulimit -n 10");
                assert!(ended.stderr.contains(&told), "{told}: {ended:?}");
                assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
            }
            // One that may be raised is, as Go's runtime does.
            let command = world.gvproxy(&["-listen-qemu", &url, "-ssh-port", "-1"]);
            let mut gvproxy = Running::start(limited(world, &command, "-S -n 64"));
            gvproxy.complains("msg=ready vm=q policy=\"none given\"");
            let limits = fs::read_to_string(format!("/proc/{}/limits", gvproxy.pid())).unwrap();
            let files = limits
                .lines()
                .find(|line| line.starts_with("Max open files"))
                .unwrap();
            let words: Vec<_> = files.split_whitespace().collect();
            assert!(words[3] == words[4] && words[3] != "64", "{files}");
        },
    );
}

#[test]
fn the_dataplanes_error_is_told_once() {
    staged(the_dataplanes_error_is_told_once, |world| {
        // Nothing can be made there, which is found when it is tried.
        let url = "unix:///proc/q.sock";
        let gvproxy = Running::start(world.gvproxy(&["-ssh-port", "-1", "-listen-qemu", url])).wait();
        assert_eq!(gvproxy.code, 1, "{gvproxy:?}");
        let told = "level=fatal msg=\"-listen-qemu unix:///proc/q.sock cannot be opened";
        assert!(gvproxy.stderr.contains(told), "{gvproxy:?}");
        assert_eq!(
            gvproxy.stderr.matches("level=info").count(),
            1,
            "the version: {gvproxy:?}"
        );
        assert_eq!(gvproxy.stderr.lines().count(), 2, "{gvproxy:?}");
        let up = world.try_vnetctl(&["up", "--listen-qemu", url]);
        assert!(
            up.stderr
                .starts_with("error: --listen-qemu unix:///proc/q.sock cannot be opened"),
            "{up:?}"
        );
        assert_eq!((up.code, up.stderr.lines().count()), (1, 1), "{up:?}");
    });
}

#[test]
fn a_dataplane_that_is_killed_or_stopped_leaves_no_socket_and_is_told_of_as_that() {
    staged(
        a_dataplane_that_is_killed_or_stopped_leaves_no_socket_and_is_told_of_as_that,
        |world| {
            let at = |name: &str| world.runtime_dir().join(name);
            let [qemu, vfkit, listen] = ["q.sock", "v.sock", "l.sock"].map(at);
            let url = |scheme: &str, path: &Path| format!("{scheme}://{}", path.display());
            let start = |words: &[&str]| {
                let mut gvproxy = Running::start(world.gvproxy(words));
                gvproxy.complains("msg=ready");
                let [dataplane] = world.processes("__dataplane")[..] else {
                    panic!("there is one dataplane");
                };
                (gvproxy, Pid::from_raw(dataplane))
            };
            let words = [
                "-debug",
                "-ssh-port",
                "-1",
                "-listen-qemu",
                &url("unix", &qemu),
                "-listen-vfkit",
                &url("unixgram", &vfkit),
                "-listen",
                &url("unix", &listen),
            ];
            let (gvproxy, dataplane) = start(&words);
            kill(dataplane, Signal::SIGKILL).unwrap();
            let ended = gvproxy.wait();
            assert_eq!(ended.code, 1, "{ended:?}");
            let fatal: Vec<_> = ended
                .stderr
                .lines()
                .filter(|line| line.contains("level=fatal"))
                .collect();
            let told = format!(
                "the dataplane was killed by signal 9 (SIGKILL); if nobody here did that, look for its pid {dataplane}"
            );
            assert!(fatal.len() == 1 && fatal[0].contains(&told), "{fatal:?}");
            assert!(!ended.stderr.contains("h2::"), "{ended:?}");
            for socket in [&qemu, &vfkit, &listen] {
                assert!(!socket.exists(), "{}", socket.display());
            }

            // One that cannot end by itself, and in whose place another has put its own meanwhile.
            let (gvproxy, dataplane) = start(&words);
            kill(dataplane, Signal::SIGSTOP).unwrap();
            fs::rename(&listen, at("old.sock")).unwrap();
            let _another = UnixListener::bind(&listen).unwrap();
            let (ended, _) = end(gvproxy, Signal::SIGTERM);
            assert_eq!(ended.code, 0, "{ended:?}");
            assert!(!qemu.exists() && !vfkit.exists());
            assert!(listen.exists(), "it is another's");
        },
    );
}

#[test]
fn a_store_that_another_one_has_is_told_with_who_that_is_and_what_the_environment_can_say() {
    staged(
        a_store_that_another_one_has_is_told_with_who_that_is_and_what_the_environment_can_say,
        |world| {
            let (_gvproxy, _) = world.gvproxy_for_qemu(&["-ssh-port", "-1"]);
            let elsewhere = world.runtime_dir().join("elsewhere");
            fs::create_dir(&elsewhere).unwrap();
            fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o700)).unwrap();
            let url = format!("unix://{}", elsewhere.join("q.sock").display());
            let [pid] = world.processes("__controlplane")[..] else {
                panic!("there is one controlplane");
            };
            let mut other = world.gvproxy(&["-ssh-port", "-1", "-listen-qemu", &url]);
            other.env("XDG_RUNTIME_DIR", &elsewhere);
            let ended = Running::start(other).wait();
            assert_eq!(ended.code, 1, "{ended:?}");
            let serves = format!("unix://{}", world.control_socket().display());
            let told = format!(
                "level=fatal msg=\"the state in {} is in use by the controlplane of another XDG_RUNTIME_DIR (pid {pid}, \
                 serving {serves}); to use that one, set XDG_RUNTIME_DIR as it has, or VNET_SERVER={serves}; to have \
                 another, set XDG_STATE_HOME to a directory of its own\"",
                world.state_dir().join("vnet").display()
            );
            assert!(ended.stderr.contains(&told), "{told}: {ended:?}");
            assert_eq!(ended.stderr.matches("level=fatal").count(), 1, "{ended:?}");

            // What it says helps.
            let mut other = world.gvproxy(&["-ssh-port", "-1", "-listen-qemu", &url]);
            other
                .env("XDG_RUNTIME_DIR", &elsewhere)
                .env("VNET_SERVER", &serves);
            Running::start(other).complains("msg=ready");
        },
    );
}

#[test]
fn no_pipe_is_waited_for_and_what_stderr_writes_to_is_not_emptied() {
    staged(
        no_pipe_is_waited_for_and_what_stderr_writes_to_is_not_emptied,
        |world| {
            let fifo = world.runtime_dir().join("fifo");
            nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let url = format!("unix://{}", world.runtime_dir().join("q.sock").display());
            let words = |flag, file: &Path| {
                let words = ["-ssh-port", "-1", "-listen-qemu", &url, flag, &text(file)];
                world.gvproxy(&words)
            };
            for (flag, what) in [("-pid-file", "written"), ("-log-file", "opened")] {
                let ended = Running::start(words(flag, &fifo)).wait();
                assert_eq!(ended.code, 1, "{ended:?}");
                let told = format!(
                    "{flag} {} cannot be {what}: it is a pipe that nobody reads",
                    fifo.display()
                );
                assert!(ended.stderr.contains(&told), "{ended:?}");
            }
            let log = world.file("log", "before\n");
            for stream in ["/dev/stderr", &text(&log)] {
                fs::write(&log, "before\n").unwrap();
                let command = words("-log-file", Path::new(stream));
                let mut shell = world.program("sh");
                shell
                    .args(["-c", "exec \"$0\" \"$@\" 2>>log"])
                    .arg(command.get_program())
                    .args(command.get_args());
                let gvproxy = Running::start(shell);
                let read = || fs::read_to_string(&log).unwrap();
                eventually("it is ready", || read().contains("msg=ready"));
                assert!(read().starts_with("before\ntime=\""), "{}", read());
                end(gvproxy, Signal::SIGTERM);
            }
        },
    );
}

#[test]
fn a_hangup_ends_it_but_where_whoever_started_it_had_that_ignored() {
    staged(
        a_hangup_ends_it_but_where_whoever_started_it_had_that_ignored,
        |world| {
            for (hangup, is_ended) in [("--default-signal=HUP", true), ("--ignore-signal=HUP", false)] {
                let services = world.runtime_dir().join("s.sock");
                let url = format!("unix://{}", services.display());
                let gvproxy = world.gvproxy(&["-ssh-port", "-1", "-services", &url]);
                let mut env = world.program("env");
                env.arg(hangup)
                    .arg(gvproxy.get_program())
                    .args(gvproxy.get_args());
                let mut running = Running::start(env);
                running.complains("msg=ready");
                running.signal(Signal::SIGHUP);
                if !is_ended {
                    let mut curl = world.program("curl");
                    curl.args(["-sS", "--unix-socket"]).arg(&services);
                    curl.arg("http://gvproxy/services/forwarder/all");
                    assert_eq!(Running::start(curl).wait().stdout, "[]\n", "it serves on");
                    running.signal(Signal::SIGTERM);
                }
                let ended = running.wait();
                assert_eq!(ended.code, 0, "{ended:?}");
            }
        },
    );
}

#[test]
fn of_several_faults_the_first_in_the_order_of_start_up_is_told() {
    staged(
        of_several_faults_the_first_in_the_order_of_start_up_is_told,
        |world| {
            let _taken = http(world.host(), "127.0.0.1:2222");
            let _also = http(world.host(), "127.0.0.1:2223");
            let config = world.file("c.yaml", "stack: {mtu: large}\n");
            let link = world.runtime_dir().join("link.pcap");
            symlink("nothing", &link).unwrap();
            let directory = world.work().to_path_buf();
            let qemu = format!("unix://{}", world.runtime_dir().join("q.sock").display());
            // Each is wrong, and mended before the next is told.
            let faults = [
                ("-lsten", "x".to_owned(), "flag provided but not defined: -lsten"),
                ("-config", text(&config), "stack.mtu"),
                ("-log-file", text(&directory), "msg=\"-log-file "),
                ("-pid-file", text(&directory), "msg=\"-pid-file "),
                ("-pcap", text(&link), "msg=\"-pcap "),
                ("-ssh-port", "2222".to_owned(), "msg=\"-ssh-port"),
                ("-services", "tcp://127.0.0.1:2223".to_owned(), "msg=\"-services "),
            ];
            for (number, (_, _, told)) in faults.iter().enumerate() {
                let mut words = vec!["-listen-qemu", &qemu, "-ssh-port", "-1"];
                // One that is not known ends the flags there.
                words.extend(
                    faults[number..]
                        .iter()
                        .rev()
                        .flat_map(|(flag, value, _)| [*flag, value]),
                );
                let ended = Running::start(world.gvproxy(&words)).wait();
                assert_eq!(ended.code, if number == 0 { 2 } else { 1 }, "{ended:?}");
                assert!(ended.stderr.contains(told), "{told}: {ended:?}");
                for (_, _, other) in faults.iter().filter(|(_, _, other)| other != told) {
                    assert!(!ended.stderr.contains(other), "{other}: {ended:?}");
                }
            }
            let config = text(&config);
            let version = Running::start(world.gvproxy(&["-config", &config, "-version"])).wait();
            assert_eq!(version.code, 0, "nothing is read for it: {version:?}");
        },
    );
}

#[test]
fn the_services_are_served_where_no_guest_can_come() {
    staged(the_services_are_served_where_no_guest_can_come, |world| {
        let socket = world.runtime_dir().join("services.sock");
        let url = format!("unix://{}", socket.display());
        let mut gvproxy = Running::start(world.gvproxy(&["-ssh-port", "-1", "-services", &url]));
        let log = gvproxy.complains("msg=ready");
        assert!(log.contains("level=warning msg=\"no guest can attach"), "{log}");
        assert!(!log.contains("what is held"), "nothing ever is: {log}");
        let mut curl = world.program("curl");
        curl.args([
            "-sS",
            "--unix-socket",
            &text(&socket),
            "http://gvproxy/services/forwarder/all",
        ]);
        assert_eq!(Running::start(curl).wait().stdout, "[]\n");
        let (ended, _) = end(gvproxy, Signal::SIGTERM);
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(!socket.exists());
    });
}

#[test]
fn what_podman_cannot_type_comes_from_ones_own_file_or_from_variables() {
    staged(
        what_podman_cannot_type_comes_from_ones_own_file_or_from_variables,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let [socket, notices] =
                ["podman-machine-default-gvproxy.sock", "n.sock"].map(|name| world.runtime_dir().join(name));
            let told = notices::listen(&notices);
            let config = world.work().join("config/vnet");
            fs::create_dir_all(&config).unwrap();
            let file = "vms: {podman-machine-default: {mode: ask, labels: {team: web}}}\n";
            fs::write(config.join("gvproxy.yaml"), file).unwrap();
            let start = |variables: &[(&str, &str)]| {
                let mut command = world.gvproxy(&[
                    "-ssh-port",
                    "-1",
                    "-listen-qemu",
                    &format!("unix://{}", socket.display()),
                    "-notification",
                    &format!("unix://{}", notices.display()),
                ]);
                command.env("XDG_CONFIG_HOME", world.work().join("config"));
                command.envs(variables.iter().copied());
                Running::start(command)
            };

            let mut gvproxy = start(&[]);
            gvproxy.complains("waiting for clients");
            let fetching = world.guest(&socket, &["curl", "-sS", "-m", "25", "http://203.0.113.10/"]);
            let said = gvproxy.complains("vnetctl approve ");
            assert!(said.contains("podman-machine-default"), "{said}");
            let pending = world.first_pending();
            assert_eq!(pending["labels"]["team"], "web", "{pending}");
            let notice = || -> Option<Value> {
                let told = told.lock().unwrap();
                told.iter()
                    .find(|n| n["notification_type"] == "network_policy_pending")
                    .cloned()
            };
            eventually("it is told", || notice().is_some());
            let notice = notice().unwrap();
            let details = &notice["details"];
            assert_eq!(
                (&details["protocol"], &details["ip"], &details["port"]),
                (&"tcp".into(), &"203.0.113.10".into(), &80.into()),
                "{notice}"
            );
            let answer = details["answer"]
                .as_str()
                .unwrap()
                .strip_prefix("vnetctl ")
                .unwrap();
            world.vnetctl(&answer.split(' ').collect::<Vec<_>>());
            let fetched = fetching.wait();
            assert_eq!((fetched.code, server.connections()), (0, 1), "{fetched:?}");
            end(gvproxy, Signal::SIGTERM);

            // A variable wins over the file.
            let mut gvproxy = start(&[("VNET_MODE", "block"), ("VNET_VM", "other")]);
            gvproxy.complains("waiting for clients");
            let fetched = world
                .guest(&socket, &["curl", "-sS", "-m", "5", "http://203.0.113.10/"])
                .wait();
            assert_eq!((fetched.code, server.connections()), (7, 1), "{fetched:?}");
            end(gvproxy, Signal::SIGTERM);
            let wrong = start(&[("VNET_MODE", "loud")]).wait();
            assert_eq!(wrong.code, 1, "{wrong:?}");
            assert!(
                wrong.stderr.contains("VNET_MODE: \\\"loud\\\" is not a mode"),
                "{wrong:?}"
            );
        },
    );
}

#[test]
fn debug_is_said_where_it_is_asked_for_and_nowhere_else() {
    staged(debug_is_said_where_it_is_asked_for_and_nowhere_else, |world| {
        let socket = world.runtime_dir().join("q.sock");
        let url = format!("unix://{}", socket.display());
        let config = |name: &str, more: &str| {
            let file = format!("log-level: warning\ninterfaces: {{qemu: \"{url}\"}}\n{more}");
            text(&world.file(name, &file))
        };
        let (quiet, loud) = (
            config("quiet.yaml", ""),
            config("loud.yaml", "stack: {debug: true}\n"),
        );
        let plain = ["-ssh-port", "-1", "-listen-qemu", &url];
        for (words, is_info, is_debug) in [
            (&plain[..], true, false),
            (&[&plain[..], &["-debug"]].concat(), true, true),
            (&["-config", &quiet], false, false),
            (&["-config", &loud], true, true),
            (&["-config", &quiet, "-debug"], true, true),
        ] {
            let gvproxy = Running::start(world.gvproxy(words));
            eventually("its socket is there", || socket.exists());
            let pinged = world
                .guest(&socket, &["ping", "-c", "1", "-W", "5", "192.168.127.1"])
                .wait();
            assert_eq!(pinged.code, 0, "{words:?}: {pinged:?}");
            let (ended, _) = end(gvproxy, Signal::SIGTERM);
            let has = |level: &str| {
                let level = format!(" level={level} ");
                ended.stderr.lines().any(|line| line.contains(&level))
            };
            assert_eq!((ended.code, has("info")), (0, is_info), "{words:?}: {ended:?}");
            assert_eq!(has("debug"), is_debug, "{words:?}: {ended:?}");
            // What the dataplane counts is told at its end.
            let counted = ended.stderr.contains("vnet_dataplane_");
            assert_eq!(counted, is_debug, "{words:?}: {ended:?}");
        }
    });
}

/// 192.168.127.2 is kept for podman's machine, by its MAC address, as in the peer.
#[test]
fn a_guest_with_an_address_that_is_kept_for_another_is_told_of_once() {
    staged(
        a_guest_with_an_address_that_is_kept_for_another_is_told_of_once,
        |world| {
            let (mut gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1"]);
            let mut other = world.load();
            other.args(["guest", "--socket"]).arg(&socket);
            other.args(["--", "ping", "-c", "2", "-W", "1", "192.168.127.1"]);
            let ended = Running::start(other).wait();
            assert_ne!(ended.code, 0, "{ended:?}");
            let said = "a VM uses an address that it cannot have, so nothing from there passes (it is kept for another";
            gvproxy.complains(said);
            assert_eq!(gvproxy.stderr().matches(said).count(), 1, "{}", gvproxy.stderr());
        },
    );
}

/// The one that is started anew knows of no VM before the dataplane has dialled again.
#[test]
fn a_restart_of_the_controlplane_tells_of_nobodys_end() {
    staged(a_restart_of_the_controlplane_tells_of_nobodys_end, |world| {
        let notices = world.runtime_dir().join("n.sock");
        let told = notices::listen(&notices);
        let types = || -> Vec<String> {
            let told = told.lock().unwrap();
            let types = told.iter().filter_map(|n| n["notification_type"].as_str());
            types.map(str::to_owned).collect()
        };
        let url = format!("unix://{}", notices.display());
        let controlplane = Controlplane::start(world, Signal::SIGKILL);
        let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1", "-notification", &url]);
        let guest = world.guest_script(&socket, "ping -c 1 192.168.127.1 && exec sleep 600");
        eventually("its coming is told", || {
            types() == ["ready", "connection_established"]
        });
        let _again = controlplane.restart(world);
        eventually("it is known again", || names(world).len() == 1);
        // Long enough for what was told before at once.
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(types(), ["ready", "connection_established"]);
        drop(guest);
        eventually("its end is told", || {
            types() == ["ready", "connection_established", "connection_closed"]
        });
    });
}

#[test]
fn a_guests_coming_lease_and_going_are_told_in_order() {
    staged(a_guests_coming_lease_and_going_are_told_in_order, |world| {
        let [socket, notices] = ["q.sock", "n.sock"].map(|name| world.runtime_dir().join(name));
        let told = notices::listen(&notices);
        let mut gvproxy = Running::start(world.gvproxy(&[
            "-ssh-port",
            "-1",
            "-listen-qemu",
            &format!("unix://{}", socket.display()),
            "-notification",
            &format!("unix://{}", notices.display()),
        ]));
        gvproxy.complains("waiting for clients");
        let types = || -> Vec<String> {
            let told = told.lock().unwrap();
            let types = told
                .iter()
                .map(|n| n["notification_type"].as_str().unwrap_or_default());
            types.map(str::to_owned).collect()
        };
        // Whoever comes after it is told of.
        eventually("it is ready", || types() == ["ready"]);
        // A length that no hypervisor sends.
        use std::io::Write as _;
        let mut evil = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        evil.write_all(&[0xff; 8]).unwrap();
        gvproxy.complains("a frame of 4294967295 bytes was announced");
        eventually("the error is told", || types() == ["ready", "hypervisor_error"]);

        let script = world.file("script", "#!/bin/sh\nexit 0\n");
        world.open_to_all(&script);
        let mut client = world.load();
        client
            .args(["guest", "--mac", FIRST_MAC, "--no-address", "--socket"])
            .arg(&socket);
        client.args(["--", "sh", "-c"]);
        client.arg("touch leases && dhclient -1 -sf ./script -lf leases -pf pid tap0; until [ -s pid ]; do sleep 0.05; done; kill $(cat pid)");
        let ended = Running::start(client).wait();
        assert_eq!(ended.code, 0, "{ended:?}");

        eventually("the end is told", || {
            types().iter().any(|t| t == "connection_closed")
        });
        assert_eq!(
            types(),
            [
                "ready",
                "hypervisor_error",
                "connection_established",
                "dhcp_assigned",
                "connection_closed"
            ]
        );
        let told = told.lock().unwrap();
        assert_eq!(told[3]["ip_address"], "192.168.127.2", "{told:?}");
        assert!(
            told[2..].iter().all(|n| n["mac_address"] == FIRST_MAC),
            "{told:?}"
        );

        drop(told);
        let (ended, _) = end(gvproxy, Signal::SIGHUP);
        assert_eq!(ended.code, 0, "{ended:?}");
    });
}

#[test]
fn two_of_one_user_stand_side_by_side() {
    staged(two_of_one_user_stand_side_by_side, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let sockets: [PathBuf; 2] = ["a.sock", "b.sock"].map(|name| world.runtime_dir().join(name));
        let running = sockets.clone().map(|socket| {
            let mut command = world.gvproxy(&[
                "-ssh-port",
                "-1",
                "-listen-qemu",
                &format!("unix://{}", socket.display()),
            ]);
            if socket.ends_with("b.sock") {
                command.arg("-secure-mode");
            }
            Running::start(command)
        });
        for socket in &sockets {
            eventually("its socket is there", || socket.exists());
        }
        let fetch = |socket: &Path| world.guest(socket, &["curl", "-sS", "http://203.0.113.10/"]);
        let asking = fetch(&sockets[1]);
        assert_eq!(world.first_pending()["vm"], "b", "the other asks");
        assert_eq!(fetch(&sockets[0]).wait().code, 0);
        assert_eq!(server.connections(), 1);
        drop(asking);
        for one in running {
            assert_eq!(end(one, Signal::SIGTERM).0.code, 0);
        }
    });
}
