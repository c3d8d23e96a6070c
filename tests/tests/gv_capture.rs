//! Packets captured to a file and live, as tshark reads them.
#![cfg(target_os = "linux")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vnet_tests::{Running, World, eventually, http, staged};

/// What tshark prints of a file with these words.
fn tshark(world: &World, file: &Path, words: &[&str]) -> String {
    let mut command = world.program("tshark");
    command.arg("-n").arg("-r").arg(file).args(words);
    let ended = Running::start(command).wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(!ended.stderr.contains("damaged"), "{ended:?}");
    ended.stdout
}

#[test]
fn a_file_of_gvproxy_shows_what_its_guest_said_and_heard() {
    staged(a_file_of_gvproxy_shows_what_its_guest_said_and_heard, |world| {
        let _server = http(world.internet(), "203.0.113.10:80");
        let [socket, file] = ["web.sock", "all.pcapng"].map(|name| world.runtime_dir().join(name));
        let gvproxy = Running::start(world.gvproxy(&[
            "-listen-qemu",
            &format!("unix://{}", socket.display()),
            "-pcap",
            &file.display().to_string(),
        ]));
        eventually("its socket is there", || socket.exists());
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let script = "dig +short @192.168.127.1 gateway.containers.internal; curl -sS http://203.0.113.10/";
        let fetched = world.guest(&socket, &["sh", "-c", script]).wait();
        assert!(fetched.stdout.contains("this is 203.0.113.10:80"), "{fetched:?}");
        // What there is can be read while it grows, a second behind at most.
        eventually("the payload is in the file", || {
            tshark(world, &file, &["-Y", "http.response"]).contains("200")
        });
        gvproxy.signal(Signal::SIGTERM);
        assert_eq!(gvproxy.wait().code, 0);

        let lines = |filter: &str, field: &str| {
            let shown = tshark(world, &file, &["-Y", filter, "-T", "fields", "-e", field]);
            shown.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let names = lines("dns.flags.response == 1", "dns.qry.name");
        assert!(
            names.iter().any(|name| name == "gateway.containers.internal"),
            "{names:?}"
        );
        assert!(
            !lines("arp.opcode == 1", "arp.dst.proto_ipv4").is_empty(),
            "ARP asked"
        );
        assert!(
            !lines("arp.opcode == 2", "arp.src.proto_ipv4").is_empty(),
            "and answered"
        );
        let handshake = lines("tcp.stream == 0 && tcp.flags.syn == 1", "tcp.flags");
        assert_eq!(handshake.len(), 2, "{handshake:?}");
        assert_eq!(lines("http.request", "http.host"), ["203.0.113.10"]);
        let directions = lines(
            "tcp.stream == 0 && tcp.flags.syn == 1",
            "frame.packet_flags_direction",
        );
        assert_ne!(directions[0], directions[1], "out and in: {directions:?}");
        let named = lines("http.request", "frame.interface_name");
        assert_eq!(named, ["web"], "the VM's name");
        // Nanoseconds since 1970, of today.
        let time = lines("http.request", "frame.time_epoch").remove(0);
        let (seconds, nanoseconds) = time.split_once('.').unwrap();
        let today = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        assert!(
            today.abs_diff(seconds.parse().unwrap()) < 600 && nanoseconds.len() == 9,
            "{time}"
        );
    });
}

#[test]
fn what_guests_say_to_each_other_is_captured_at_both() {
    staged(what_guests_say_to_each_other_is_captured_at_both, |world| {
        let file = world.work().join("both.pcapng");
        let other = world.runtime_dir().join("db.sock");
        let url = format!("unix://{}?name=db", other.display());
        let (up, socket) = world.up(&["--listen-qemu", &url, "--pcap", &file.display().to_string()]);
        let mut db = world.load();
        db.args(["guest", "--address", "192.168.127.3/24", "--socket"])
            .arg(other)
            .args(["--", "sh", "-c", "ping -c 1 -W 5 192.168.127.1; exec sleep 60"]);
        let mut db = Running::start(db);
        db.prints("1 received");
        let pinged = world.guest(
            Path::new(&socket),
            &["ping", "-c", "1", "-W", "5", "192.168.127.3"],
        );
        assert_eq!(pinged.wait().code, 0);
        up.signal(Signal::SIGTERM);
        assert_eq!(up.wait().code, 0);
        drop(db);

        let fields = ["-T", "fields", "-e", "frame.interface_name", "-e", "icmp.type"];
        let between = [
            "-Y",
            "icmp && ip.addr == 192.168.127.2 && ip.addr == 192.168.127.3",
        ];
        let shown = tshark(world, &file, &[&between[..], &fields].concat());
        let mut shown: Vec<&str> = shown.lines().collect();
        shown.sort_unstable();
        assert_eq!(shown, ["db\t0", "db\t8", "web\t0", "web\t8"]);
    });
}

#[test]
fn a_capture_that_nobody_reads_any_more_ends_and_the_network_goes_on() {
    staged(
        a_capture_that_nobody_reads_any_more_ends_and_the_network_goes_on,
        |world| {
            let _server = http(world.internet(), "203.0.113.10:80");
            let pipe = world.work().join("pipe");
            nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_retain(0o600)).unwrap();
            let socket = world.work().join("q.sock");
            let mut up = Running::start(world.command(&[
                "up",
                "--listen-qemu",
                &format!("unix://{}", socket.display()),
                "--pcap",
                &pipe.display().to_string(),
            ]));
            up.complains("waiting for a reader");
            let mut head = world.program("head");
            head.args(["-c", "4"]).arg(&pipe);
            let head = Running::start(head).wait();
            assert_eq!(head.code, 0, "{head:?}");
            eventually("its socket is there", || socket.exists());
            for _ in 0..2 {
                let fetched = world
                    .guest(&socket, &["curl", "-sS", "http://203.0.113.10/"])
                    .wait();
                assert_eq!(fetched.stdout, "this is 203.0.113.10:80 at /\n", "{fetched:?}");
            }
            up.complains("the capture has ended");
            up.signal(Signal::SIGTERM);
            assert_eq!(up.wait().code, 0);
        },
    );
}

#[test]
fn a_capture_ends_with_its_limit_and_the_network_goes_on() {
    const LIMIT: u64 = 20_000;
    staged(a_capture_ends_with_its_limit_and_the_network_goes_on, |world| {
        let _server = http(world.internet(), "203.0.113.10:80");
        let file = world.work().join("small.pcapng");
        let (mut up, socket) = world.up(&["--pcap", &file.display().to_string(), "--pcap-limit", "20kB"]);
        let script =
            "ping -c 30 -i 0.01 -s 1000 -W 5 192.168.127.1 > /dev/null; curl -sS http://203.0.113.10/";
        let fetched = world.guest(Path::new(&socket), &["sh", "-c", script]).wait();
        assert_eq!(fetched.stdout, "this is 203.0.113.10:80 at /\n", "{fetched:?}");
        up.complains("its file is as large as it may be");
        let length = file.metadata().unwrap().len();
        assert!((LIMIT - 1_500..=LIMIT).contains(&length), "{length}");
        assert_ne!(tshark(world, &file, &["-Y", "icmp"]), "");
        up.signal(Signal::SIGTERM);
        assert_eq!(up.wait().code, 0);
    });
}

#[test]
fn readers_that_hang_cost_packets_and_delay_neither_guest_nor_signal() {
    staged(
        readers_that_hang_cost_packets_and_delay_neither_guest_nor_signal,
        |world| {
            let _sink = vnet_tests::tcp(world.internet(), "203.0.113.10:9", |mut stream, _| {
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            });
            let [all, live] = ["all", "live"].map(|name| world.work().join(name));
            let mut hang = Vec::new();
            for pipe in [&all, &live] {
                nix::unistd::mkfifo(pipe, nix::sys::stat::Mode::from_bits_retain(0o600)).unwrap();
                let mut reader = world.program("sh");
                reader.args(["-c", "exec sleep 100 < $0"]).arg(pipe);
                hang.push(Running::start(reader));
            }
            let (up, socket) = world.up(&["--pcap", &all.display().to_string()]);
            let go = world.work().join("go");
            nix::unistd::mkfifo(&go, nix::sys::stat::Mode::from_bits_retain(0o600)).unwrap();
            let script = "ping -c 1 -W 5 192.168.127.1; read go < go; \
                          head -c 30000000 /dev/zero | socat -u - tcp:203.0.113.10:9; echo sent; exec sleep 60";
            let mut guest = world.guest(Path::new(&socket), &["sh", "-c", script]);
            eventually("the guest is there", || !world.list(&["vm", "list"]).is_empty());
            let capture =
                Running::start(world.command(&["capture", "web", "-w", &live.display().to_string()]));
            let counter = |name: &str| {
                let vm = world.json(&["vm", "show", "web"]);
                vm["counters"][name]
                    .as_str()
                    .map_or(0, |count| count.parse().unwrap())
            };
            std::fs::write(&go, "go\n").unwrap();
            guest.prints("sent");
            eventually("what is lost is counted", || counter("capture_dropped") > 1_000);

            capture.signal(Signal::SIGINT);
            let began = Instant::now();
            let ended = capture.wait();
            assert!(began.elapsed() < Duration::from_secs(5), "{ended:?}");
            assert!(ended.stderr.contains("takes no more"), "{ended:?}");
            let began = Instant::now();
            up.signal(Signal::SIGTERM);
            assert_eq!(up.wait().code, 0);
            assert!(began.elapsed() < Duration::from_secs(5));
        },
    );
}

#[test]
fn a_live_capture_has_what_its_filter_wants_and_nothing_else() {
    staged(
        a_live_capture_has_what_its_filter_wants_and_nothing_else,
        |world| {
            let _server = http(world.internet(), "203.0.113.10:80");
            let (up, socket) = world.up(&[]);
            // It is there, and says so, before it is captured.
            let script = "ping -c 1 -W 5 192.168.127.1; read go < go; dig +short @192.168.127.1 gateway.containers.internal; \
                      curl -sS http://203.0.113.10/; sleep 60";
            let go = world.work().join("go");
            nix::unistd::mkfifo(&go, nix::sys::stat::Mode::from_bits_retain(0o600)).unwrap();
            let guest = world.guest(Path::new(&socket), &["sh", "-c", script]);
            eventually("the guest is there", || !world.list(&["vm", "list"]).is_empty());

            let file = world.work().join("live.pcapng");
            let piped = "vnetctl capture web --filter 'tcp port 80' -w - | tee live.pcapng | tshark -n -l -r - -Y http";
            let mut shell = world.program("sh");
            shell.args([
                "-c",
                &piped.replace("vnetctl", &world.command(&[]).get_program().to_string_lossy()),
            ]);
            let mut capture = Running::start(shell);
            eventually("it has begun", || {
                file.metadata().is_ok_and(|file| file.len() > 0)
            });
            std::fs::write(&go, "go\n").unwrap();
            capture.prints("GET / HTTP/1.1");
            up.signal(Signal::SIGTERM);
            assert_eq!(up.wait().code, 0);
            drop(guest);
            let ended = capture.wait();
            assert!(
                ended.stderr.contains("captured, 0 dropped of VM web"),
                "{ended:?}"
            );

            let others = tshark(world, &file, &["-Y", "not tcp.port == 80"]);
            assert_eq!(others, "", "only what was asked for");
            assert!(tshark(world, &file, &["-Y", "http.response"]).contains("200"));
            let wrong = world.try_vnetctl(&["capture", "web", "--filter", "tpc", "-w", "-"]);
            assert_eq!(wrong.code, 2, "{wrong:?}");
            assert!(
                wrong.stderr.contains("\"tpc\" is no term of a filter"),
                "{wrong:?}"
            );
        },
    );
}
