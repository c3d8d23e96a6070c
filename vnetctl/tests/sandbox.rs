//! Guests out of namespaces, on the real kernel: every promise of `vnetctl::sandbox` about what a
//! command finds, what becomes of it, and what is left behind.
//!
//! Where the machine refuses namespaces these fail and say why. Each test runs as whoever runs the tests;
//! those named `ordinary_user_*` run as an ordinary user (as `nobody` if the tests run as root), and
//! those named `staged_*` inside another user namespace.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use vnetctl::sandbox::{self, Exit, LinkKind, Sandbox, Spec, stage};

const PATIENCE: Duration = Duration::from_secs(20);

/// A directory that everybody may write to, gone at the end of a test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = PathBuf::from(format!("/tmp/vnet-test-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        Scratch(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn spec(command: &[&str]) -> Spec {
    let mut spec = Spec::new(command.iter().copied());
    spec.program = Some(env!("CARGO_BIN_EXE_vnetctl").into());
    spec.cwd = Some("/".into());
    spec
}

fn run(spec: &Spec) -> Exit {
    let mut sandbox = sandbox::spawn(spec).unwrap_or_else(|error| panic!("{error}"));
    sandbox.start().unwrap();
    wait(&mut sandbox)
}

fn wait(sandbox: &mut Sandbox) -> Exit {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE, sandbox.wait())
            .await
            .expect("the command hangs")
    })
}

/// Runs a shell script in a guest and returns what it printed.
fn script_with(change: impl FnOnce(&mut Spec), script: &str) -> String {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let scratch = Scratch::new(&format!("script{number}"));
    let output = scratch.path("output");
    let mut spec = spec(&[
        "/bin/sh",
        "-c",
        &format!("exec >{} 2>&1; {script}", output.display()),
    ]);
    change(&mut spec);
    let exit = run(&spec);
    let printed = fs::read_to_string(output).unwrap_or_default();
    assert_eq!(exit.code, 0, "{exit:?}: {printed}");
    printed
}

fn script(text: &str) -> String {
    script_with(|_| {}, text)
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "still not so: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Processes of this machine whose command line contains this.
fn processes_with(text: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(text) {
            found.push(pid);
        }
    }
    found
}

/// Runs a test of this file again as an ordinary user; true in that run.
fn as_ordinary_user(test: &str) -> bool {
    if !geteuid().is_root() {
        return true;
    }
    // The build directory need not be open to others.
    let scratch = Scratch::new(test);
    let (tests, program) = (scratch.path("tests"), scratch.path("vnetctl"));
    fs::copy("/proc/self/exe", &tests).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_vnetctl"), &program).unwrap();
    let status = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&tests)
        .args([test, "--exact", "--nocapture"])
        .env("VNET_TEST_PROGRAM", &program)
        .env_remove("XDG_RUNTIME_DIR")
        .current_dir("/")
        .status()
        .expect("setpriv (package util-linux) runs the test as an ordinary user");
    assert!(status.success(), "{test} failed as an ordinary user");
    false
}

/// Runs a test of this file again inside a stage; true in that run.
fn in_stage(test: &str) -> bool {
    if stage::inside() {
        return true;
    }
    let status =
        stage::reexec_self([test, "--exact", "--nocapture"]).unwrap_or_else(|error| panic!("{error}"));
    assert!(status.success(), "{test} failed inside a stage");
    false
}

fn ordinary(command: &[&str]) -> Spec {
    let mut spec = spec(command);
    if let Some(program) = std::env::var_os("VNET_TEST_PROGRAM") {
        spec.program = Some(program.into());
    }
    spec
}

/// The first frame on a link that holds.
fn frame_where(link: &sandbox::Link, holds: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = [0; 65536];
    while Instant::now() < deadline {
        let mut fds = [PollFd::new(link.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(500u16)).unwrap();
        if let Ok(length) = nix::unistd::read(&link.fd, &mut buffer)
            && holds(&buffer[..length])
        {
            return buffer[..length].to_vec();
        }
    }
    panic!("the expected frame did not arrive");
}

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const GATEWAY_MAC: [u8; 6] = [0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd];

/// Plays the gateway for one UDP exchange: answers the guest's ARP request and echoes its datagram's
/// existence by returning it whole.
fn first_datagram(link: &sandbox::Link) -> Vec<u8> {
    let request = frame_where(link, |frame| {
        // Not the announcement of its own address, which comes first (RFC 5227 §2.3).
        frame[12..14] == ETHERTYPE_ARP && frame[20..22] == [0, 1] && frame[28..32] != frame[38..42]
    });
    assert_eq!(request[6..12], link.mac, "the frame is the guest's own");
    assert_eq!(request[28..32], [192, 168, 127, 2]);
    assert_eq!(request[38..42], [192, 168, 127, 1]);
    let mut reply = request.clone();
    reply[0..6].copy_from_slice(&link.mac);
    reply[6..12].copy_from_slice(&GATEWAY_MAC);
    reply[20..22].copy_from_slice(&[0, 2]);
    reply[22..28].copy_from_slice(&GATEWAY_MAC);
    reply[28..32].copy_from_slice(&request[38..42]);
    reply[32..38].copy_from_slice(&link.mac);
    reply[38..42].copy_from_slice(&request[28..32]);
    assert_eq!(nix::unistd::write(&link.fd, &reply).unwrap(), reply.len());
    frame_where(link, |frame| {
        assert_ne!(frame[6..12], GATEWAY_MAC, "the link hears what it sent");
        frame[12..14] == [0x08, 0x00] && frame[23] == 17
    })
}

/// RFC 1071 over the pseudo header and the datagram; 0 if the checksum is right.
fn udp_checksum(frame: &[u8]) -> u16 {
    let ip = &frame[14..];
    let datagram = &ip[20..usize::from(u16::from_be_bytes([ip[2], ip[3]]))];
    let length = u16::try_from(datagram.len()).unwrap().to_be_bytes();
    let mut bytes = [&ip[12..20], &[0, 17], &length, datagram].concat();
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn link_carries_whole_frames(mut spec: Spec, kind: LinkKind) {
    spec.mtu_bytes = 9000;
    let mut sandbox = sandbox::spawn(&spec).unwrap_or_else(|error| panic!("{error}"));
    let link = sandbox.link.take().unwrap();
    assert_eq!(link.kind, kind);
    sandbox.start().unwrap();
    let frame = first_datagram(&link);
    assert_eq!(frame[0..6], GATEWAY_MAC);
    assert_ne!(frame[40..42], [0, 0], "the datagram has a checksum");
    assert_eq!(udp_checksum(&frame), 0, "the checksum is complete");
    drop(sandbox);
}

const SENDS_A_DATAGRAM: [&str; 3] = ["/bin/bash", "-c", "echo hello >/dev/udp/203.0.113.5/9; sleep 60"];

#[test]
fn exit_status_is_the_commands() {
    assert_eq!(run(&spec(&["/bin/true"])).code, 0);
    assert_eq!(run(&spec(&["sh", "-c", "exit 3"])).code, 3);
    let killed = run(&spec(&["sh", "-c", "kill -TERM $$"]));
    assert_eq!((killed.code, killed.signal), (143, Some(15)));
    let missing = run(&spec(&["vnet-no-such-command"]));
    assert_eq!(missing.code, 127);
    assert!(missing.reason.unwrap().contains("vnet-no-such-command"));
    let scratch = Scratch::new("plain-file");
    fs::write(scratch.path("plain"), "not a program").unwrap();
    assert_eq!(run(&spec(&[scratch.path("plain").to_str().unwrap()])).code, 126);
    assert_eq!(run(&spec(&["/etc"])).code, 126);
}

#[test]
fn command_has_no_privilege_and_no_stray_descriptor() {
    // A descriptor that the front holds open without FD_CLOEXEC.
    let leaked = nix::unistd::dup(fs::File::open("/dev/null").unwrap()).unwrap();
    let printed = script("ls -l /proc/self/fd; cat /proc/self/status");
    drop(leaked);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(
            printed.contains(&format!("{set}:\t0000000000000000")),
            "{printed}"
        );
    }
    assert!(printed.contains("NoNewPrivs:\t1"), "{printed}");
    assert!(printed.contains("SigBlk:\t0000000000000000"), "{printed}");
    // But for two signals of the C library's own, which posix_spawn(3) has every program ignore.
    let ignored = printed
        .split("SigIgn:\t")
        .nth(1)
        .and_then(|rest| u64::from_str_radix(&rest[..16], 16).ok());
    assert_eq!(ignored.unwrap() & !0x1_8000_0000, 0, "{printed}");
    // 3 is the directory that `ls` itself reads.
    let stray = printed
        .lines()
        .filter(|line| line.contains(" -> "))
        .filter(|line| {
            !["0", "1", "2", "3"]
                .iter()
                .any(|number| line.contains(&format!(" {number} -> ")))
        });
    assert_eq!(stray.count(), 0, "{printed}");
}

#[test]
fn command_sees_its_own_processes_and_network_only() {
    let printed = script("echo self $$; ls /proc | grep -E '^[0-9]+$' | tr '\\n' ' '; cat /proc/net/dev");
    let pids: Vec<u32> = printed
        .lines()
        .nth(1)
        .unwrap()
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    assert!(
        pids.len() <= 6 && pids.contains(&1) && pids.iter().all(|pid| *pid < 20),
        "{printed}"
    );
    let interfaces: Vec<&str> = printed
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .collect();
    let mut sorted = interfaces.clone();
    sorted.sort();
    assert_eq!(sorted, ["eth0", "lo"], "{printed}");
    assert!(!script("cat /proc/net/if_inet6 || true").contains("eth0"));
}

#[test]
fn mounts_give_no_privilege() {
    let mounts = script("cat /proc/self/mounts");
    for line in mounts.lines() {
        let options = line.split_whitespace().nth(3).unwrap_or_default();
        assert!(options.split(',').any(|option| option == "nosuid"), "{line}");
    }
}

#[test]
fn init_is_closed_to_the_command() {
    let printed =
        script("for f in 0 1 3 4 5; do readlink /proc/1/fd/$f; done; readlink /proc/1/ns/net; echo end");
    assert_eq!(printed, "end\n");
}

#[test]
fn resolver_is_the_gateway() {
    let before = fs::read("/etc/resolv.conf").ok();
    assert_eq!(
        script("cat /etc/resolv.conf"),
        "nameserver 192.168.127.1\noptions timeout:30 attempts:2\n"
    );
    assert_eq!(
        fs::read("/etc/resolv.conf").ok(),
        before,
        "the host's is untouched"
    );
}

#[test]
fn hidden_sockets_cannot_be_reached() {
    let scratch = Scratch::new("hidden");
    let runtime = scratch.path("runtime");
    let state = scratch.path("state");
    fs::create_dir_all(runtime.join("vnet")).unwrap();
    fs::create_dir_all(&state).unwrap();
    let _control = UnixListener::bind(runtime.join("vnet/control.sock")).unwrap();
    let _bus = UnixListener::bind(runtime.join("bus")).unwrap();
    let _state = UnixListener::bind(state.join("s.sock")).unwrap();
    let _engine = UnixListener::bind(scratch.path("engine.sock")).unwrap();
    let _other = UnixListener::bind(runtime.join("other")).unwrap();
    UnixStream::connect(runtime.join("bus")).expect("reachable outside");

    let connect = |path: &Path| {
        format!(
            "curl -s -o /dev/null --max-time 1 --unix-socket {} http://x/; echo {} $?",
            path.display(),
            path.display()
        )
    };
    let paths = [
        runtime.join("vnet/control.sock"),
        runtime.join("bus"),
        state.join("s.sock"),
        scratch.path("engine.sock"),
    ];
    let text: Vec<String> = paths.iter().map(|path| connect(path)).collect();
    // A socket that appears while the command runs stays outside as well.
    let late = runtime.join("podman");
    let text = format!(
        "{}; {}; touch {}; while ! test -e {}; do sleep 0.01; done; test ! -e {} && echo late is hidden",
        text.join("; "),
        connect(&runtime.join("other")),
        scratch.path("ready").display(),
        scratch.path("go").display(),
        late.display(),
    );
    let ready = scratch.path("ready");
    let go = scratch.path("go");
    let appears = {
        let late = late.clone();
        std::thread::spawn(move || {
            eventually("the command is ready", || ready.exists());
            let listener = UnixListener::bind(&late).unwrap();
            fs::write(go, "").unwrap();
            listener
        })
    };
    let printed = script_with(
        |spec| {
            spec.masks = vec![runtime.join("vnet"), state.clone()];
            spec.env = vec![
                ("XDG_RUNTIME_DIR".into(), runtime.clone().into()),
                (
                    "DOCKER_HOST".into(),
                    format!("unix://{}", scratch.path("engine.sock").display()).into(),
                ),
            ];
        },
        &text,
    );
    appears.join().unwrap();
    for path in paths {
        // curl's code for "could not connect".
        assert!(printed.contains(&format!("{} 7\n", path.display())), "{printed}");
    }
    // One that is not hidden is seen, and cannot be connected to either.
    assert!(
        printed.contains(&format!("{} 7\n", runtime.join("other").display()))
            && runtime.join("other").exists(),
        "{printed}"
    );
    assert!(printed.contains("late is hidden"), "{printed}");
    assert!(runtime.join("bus").exists() && runtime.join("vnet/control.sock").exists());
}

#[test]
fn vsock_does_not_exist_for_the_command() {
    let printed = script(
        "python3 -c 'import socket\ntry: socket.socket(40, 1); print(\"made\")\nexcept OSError as e: print(e.errno)' || true",
    );
    assert_eq!(printed.trim(), libc::EAFNOSUPPORT.to_string());
}

#[test]
fn signals_reach_the_command() {
    let scratch = Scratch::new("signals");
    let ready = scratch.path("ready");
    let text = format!(
        "trap 'exit 42' TERM; touch {}; while :; do sleep 0.05; done",
        ready.display()
    );
    let mut sandbox = sandbox::spawn(&spec(&["/bin/sh", "-c", &text])).unwrap();
    sandbox.start().unwrap();
    eventually("the trap is set", || ready.exists());
    sandbox.signal(Signal::SIGTERM as i32).unwrap();
    assert_eq!(wait(&mut sandbox).code, 42);
}

#[test]
fn dropping_a_guest_ends_all_of_it() {
    let mark = format!("86{:05}.5", std::process::id() % 100_000);
    let sandbox = sandbox::spawn(&spec(&[
        "/bin/sh",
        "-c",
        &format!("sleep {mark} & setsid sleep {mark}"),
    ]))
    .unwrap();
    sandbox.start().unwrap();
    eventually("both sleep", || processes_with(&mark).len() >= 3);
    drop(sandbox);
    assert_eq!(processes_with(&mark), Vec::<i32>::new());
}

#[test]
fn killing_the_helper_ends_the_command() {
    let mark = format!("87{:05}.5", std::process::id() % 100_000);
    let mut sandbox = sandbox::spawn(&spec(&["/bin/sleep", &mark])).unwrap();
    sandbox.start().unwrap();
    eventually("it sleeps", || processes_with(&mark).len() >= 2);
    kill(Pid::from_raw(sandbox.helper_pid()), Signal::SIGKILL).unwrap();
    let exit = wait(&mut sandbox);
    assert_eq!(exit.code, 125);
    assert!(exit.reason.unwrap().contains("SIGKILL"));
    eventually("nothing is left", || processes_with(&mark).is_empty());
}

#[test]
fn killing_the_front_leaves_nothing() {
    let mark = "88123.25";
    // In that run: be the front, until killed.
    if std::env::var_os("VNET_TEST_FRONT").is_some() {
        let sandbox = sandbox::spawn(&spec(&[
            "/bin/sh",
            "-c",
            &format!("sleep {mark} & setsid sleep {mark}"),
        ]))
        .unwrap();
        sandbox.start().unwrap();
        std::thread::sleep(PATIENCE * 3);
        return;
    }
    let mut front = Command::new("/proc/self/exe")
        .args(["killing_the_front_leaves_nothing", "--exact", "--nocapture"])
        .env("VNET_TEST_FRONT", "1")
        .spawn()
        .unwrap();
    eventually("the command runs", || processes_with(mark).len() >= 3);
    front.kill().unwrap();
    front.wait().unwrap();
    eventually("nothing is left", || processes_with(mark).is_empty());
}

#[test]
fn pty_is_the_commands_own() {
    let scratch = Scratch::new("pty");
    let output = scratch.path("output");
    let text = format!(
        "{{ tty; stty size; ps -o stat= -p $$; echo typed >/dev/tty; read line; echo got $line; }} >{} 2>&1",
        output.display()
    );
    let mut spec = spec(&["/bin/sh", "-c", &text]);
    spec.pty = [true, false, true];
    let mut sandbox = sandbox::spawn(&spec).unwrap();
    let pty = sandbox.pty.take().expect("a pty was asked for");
    let mut pty = fs::File::from(pty);
    let size = libc::winsize {
        ws_row: 33,
        ws_col: 99,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads the winsize that it is given.
    unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&pty),
            libc::TIOCSWINSZ,
            &raw const size,
        )
    };
    sandbox.start().unwrap();
    let mut shown = [0; 256];
    let length = pty.read(&mut shown).unwrap();
    assert_eq!(&shown[..length], b"typed\r\n");
    pty.write_all(b"a line\n").unwrap();
    assert_eq!(wait(&mut sandbox).code, 0);
    let printed = fs::read_to_string(output).unwrap();
    assert!(printed.starts_with("/dev/pts/0\n33 99\n"), "{printed}");
    assert!(printed.ends_with("got a line\n"), "{printed}");
}

#[test]
fn suspend_key_stops_the_command_and_tells() {
    let mut spec = spec(&["/bin/sleep", "60"]);
    spec.pty = [true; 3];
    let mut sandbox = sandbox::spawn(&spec).unwrap();
    let mut pty = fs::File::from(sandbox.pty.take().unwrap());
    sandbox.start().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    std::thread::sleep(Duration::from_millis(200));
    pty.write_all(&[0x1a]).unwrap();
    let event = runtime.block_on(async { tokio::time::timeout(PATIENCE, sandbox.event()).await.unwrap() });
    assert_eq!(event, sandbox::Event::Stopped(Signal::SIGTSTP as i32));
    sandbox.signal(Signal::SIGCONT as i32).unwrap();
    pty.write_all(&[0x03]).unwrap();
    assert_eq!(wait(&mut sandbox).signal, Some(Signal::SIGINT as i32));
}

#[test]
fn link_is_a_tap_device_where_that_may_be_opened() {
    let tap = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .is_ok();
    let kind = if tap { LinkKind::Tap } else { LinkKind::Packet };
    link_carries_whole_frames(spec(&SENDS_A_DATAGRAM), kind);
}

#[test]
fn link_is_a_packet_socket_elsewhere() {
    let mut spec = spec(&SENDS_A_DATAGRAM);
    spec.force_packet_socket = true;
    link_carries_whole_frames(spec, LinkKind::Packet);
}

#[test]
fn kernel_settings_are_closed_to_root_too() {
    let text = "test ! -w /proc/sys/kernel/core_pattern && test -z \"$(head -c 1 /dev/kmsg)\" && test ! -w /proc/sys/kernel/modprobe";
    assert_eq!(run(&spec(&["/bin/sh", "-c", text])).code, 0);
}

#[test]
fn ordinary_user_has_a_guest_too() {
    if !as_ordinary_user("ordinary_user_has_a_guest_too") {
        return;
    }
    assert!(!geteuid().is_root());
    let scratch = Scratch::new("ordinary");
    let output = scratch.path("output");
    let text = format!(
        "exec >{}; id -u; grep Cap /proc/self/status; cat /etc/resolv.conf",
        output.display()
    );
    let exit = run(&ordinary(&["/bin/sh", "-c", &text]));
    let printed = fs::read_to_string(&output).unwrap();
    assert_eq!(exit.code, 0, "{printed}");
    assert!(printed.starts_with(&format!("{}\n", geteuid())), "{printed}");
    assert!(printed.contains("CapBnd:\t0000000000000000") && printed.contains("nameserver 192.168.127.1"));
    let mut spec = ordinary(&SENDS_A_DATAGRAM);
    spec.force_packet_socket = true;
    link_carries_whole_frames(spec, LinkKind::Packet);
}

#[test]
fn staged_guest_and_internet_work() {
    if !in_stage("staged_guest_and_internet_work") {
        return;
    }
    let spec = stage::StageSpec {
        resolv_conf: Some("nameserver 203.0.113.10\n".into()),
        ..Default::default()
    };
    let stage = stage::Stage::build(&spec).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        fs::read_to_string("/etc/resolv.conf").unwrap(),
        "nameserver 203.0.113.10\n"
    );
    let listeners = stage::in_namespace(&stage.internet, || {
        ["203.0.113.10:80", "198.51.100.7:80"].map(|address| std::net::TcpListener::bind(address).unwrap())
    });
    for listener in listeners.join().unwrap().unwrap() {
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_string(), "203.0.113.1");
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
    }
    let mut there = stage::command_in(&stage.internet, Command::new("ip"));
    let shown = there
        .args(["-br", "addr"])
        .output()
        .expect("ip (package iproute2) runs")
        .stdout;
    assert!(String::from_utf8_lossy(&shown).contains("198.51.100.7/32"));
    assert_eq!(
        script("cat /etc/resolv.conf | head -1"),
        "nameserver 192.168.127.1\n"
    );
    assert_eq!(run(&self::spec(&["sh", "-c", "exit 3"])).code, 3);
}

#[test]
fn staged_resolver_is_the_gateway_whatever_the_host_has() {
    if !in_stage("staged_resolver_is_the_gateway_whatever_the_host_has") {
        return;
    }
    let ours = "nameserver 192.168.127.1\noptions timeout:30 attempts:2\n";
    let tmpfs = Some("tmpfs");
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(tmpfs, "/etc", tmpfs, flags, None::<&str>).expect("a stage may mount");
    assert_eq!(script("cat /etc/resolv.conf"), ours, "where there is none");
    assert!(!Path::new("/etc/resolv.conf").exists());

    // As systemd-resolved has it: a link into a directory that is hidden.
    let run = Path::new("/run");
    nix::mount::mount(tmpfs, run, tmpfs, flags, None::<&str>).unwrap();
    fs::create_dir_all(run.join("systemd/resolve")).unwrap();
    fs::write(
        run.join("systemd/resolve/stub-resolv.conf"),
        "nameserver 127.0.0.53\n",
    )
    .unwrap();
    std::os::unix::fs::symlink("../run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf").unwrap();
    assert_eq!(
        script("cat /etc/resolv.conf; ls /run"),
        ours,
        "where its target is hidden"
    );
    assert_eq!(
        fs::read_to_string("/etc/resolv.conf").unwrap(),
        "nameserver 127.0.0.53\n"
    );

    fs::write(run.join("plain.conf"), "nameserver 9.9.9.9\n").unwrap();
    fs::remove_file("/etc/resolv.conf").unwrap();
    std::os::unix::fs::symlink("/run/plain.conf", "/etc/resolv.conf").unwrap();
    assert_eq!(
        script("cat /run/plain.conf"),
        ours,
        "where its target is elsewhere"
    );
}
