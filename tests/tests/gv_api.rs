//! gvproxy's services API as its clients use it: curl on the sockets of `-listen` and `-services`, and from inside a guest.
//! What each path answers byte for byte is tested beside it (`vnetctl/src/gvproxy/services/tests`).

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vnet_tests::{Running, World, eventually, http, staged};

/// A `gvproxy` with every socket of its own.
struct Peer {
    running: Running,
    listen: PathBuf,
    services: PathBuf,
    qemu: PathBuf,
}

impl Peer {
    fn start(world: &World, name: &str, flags: &[&str]) -> Peer {
        Self::with(world, name, flags, &[])
    }

    fn with(world: &World, name: &str, flags: &[&str], variables: &[(&str, &str)]) -> Peer {
        let [listen, services, qemu] =
            ["listen", "api", "qemu"].map(|kind| world.runtime_dir().join(format!("{name}-{kind}.sock")));
        let url = |path: &Path| format!("unix://{}", path.display());
        let (on_listen, on_services, on_qemu) = (url(&listen), url(&services), url(&qemu));
        let sockets = [
            "-ssh-port",
            "-1",
            "-listen",
            &on_listen,
            "-services",
            &on_services,
            "-listen-qemu",
            &on_qemu,
        ];
        let mut command = world.gvproxy(&[&sockets[..], flags].concat());
        command.envs(variables.iter().copied());
        let mut running = Running::start(command);
        running.complains("msg=ready");
        Peer {
            running,
            listen,
            services,
            qemu,
        }
    }
}

/// Status and body of a request over a Unix socket; a body makes it a POST.
fn ask(world: &World, socket: &Path, path: &str, body: Option<&Value>) -> (u16, String) {
    let mut curl = world.program("curl");
    curl.args(["-sS", "-w", "\n%{http_code}", "--unix-socket"])
        .arg(socket);
    if let Some(body) = body {
        curl.args(["-d", &body.to_string()]);
    }
    curl.arg(format!("http://vnet{path}"));
    let ended = Running::start(curl).wait();
    let (body, status) = ended
        .stdout
        .rsplit_once('\n')
        .unwrap_or_else(|| panic!("{path}: {ended:?}"));
    (status.parse().unwrap(), body.to_owned())
}

fn get(world: &World, socket: &Path, path: &str) -> Value {
    let (status, body) = ask(world, socket, path, None);
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap_or_else(|_| panic!("{path}: {body}"))
}

const SERVE: &str = "ping -c 1 -W 5 192.168.127.1 >/dev/null; exec socat tcp-listen:80,fork,reuseaddr 'system:echo from the guest'";

#[test]
fn a_stopped_controlplane_is_named_in_time_to_everyone_and_missed_no_longer_than_it_is_stopped() {
    staged(
        a_stopped_controlplane_is_named_in_time_to_everyone_and_missed_no_longer_than_it_is_stopped,
        |world| {
            let peer = Peer::start(world, "a", &[]);
            assert!(get(world, &peer.services, "/leases").is_object());
            let [controlplane] = world.processes("__controlplane")[..] else {
                panic!("there is one controlplane");
            };
            let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(controlplane), signal);
            signal(Signal::SIGSTOP).unwrap();

            let asked = Instant::now();
            let (status, body) = ask(world, &peer.services, "/leases", None);
            assert_eq!(status, 503, "{body}");
            assert!(body.contains("does not answer"), "{body}");
            let listed = world.try_vnetctl(&["pending", "list"]);
            assert_eq!(listed.code, 1, "{listed:?}");
            assert!(
                listed.stderr.contains("it may be stopped (state T in ps)"),
                "{listed:?}"
            );
            // One that comes meanwhile waits, with its sockets open.
            let other = format!("unix://{}", world.runtime_dir().join("other.sock").display());
            let mut other = Running::start(world.gvproxy(&["-ssh-port", "-1", "-listen-qemu", &other]));
            other.complains("nothing is let out before the controlplane answers");
            other.complains("waiting for clients");
            assert!(asked.elapsed() < Duration::from_secs(30), "{:?}", asked.elapsed());

            signal(Signal::SIGCONT).unwrap();
            eventually("it answers again", || {
                ask(world, &peer.services, "/leases", None).0 == 200
            });
            other.complains("msg=ready");
        },
    );
}

#[test]
fn forwards_are_exposed_listed_and_ended_by_curl() {
    staged(forwards_are_exposed_listed_and_ended_by_curl, |world| {
        let peer = Peer::start(world, "a", &[]);
        let _guest = world.guest_script(&peer.qemu, SERVE);
        let all = || get(world, &peer.services, "/services/forwarder/all");
        assert_eq!(all(), json!([]));

        let web = json!({"local": "127.0.0.1:8081", "remote": "192.168.127.2:80"});
        let expose = |body: &Value| ask(world, &peer.services, "/services/forwarder/expose", Some(body));
        assert_eq!(expose(&web), (200, String::new()));
        assert_eq!(
            all(),
            json!([{"local": "127.0.0.1:8081", "remote": "192.168.127.2:80", "protocol": "tcp"}])
        );
        let fetch = || {
            let mut socat = world.program("socat");
            socat.args(["-T2", "-", "tcp:127.0.0.1:8081"]);
            Running::start(socat).wait().stdout
        };
        eventually("the guest answers", || fetch() == "from the guest\n");
        assert_eq!(
            expose(&web),
            (
                500,
                "proxy already running for tcp on 127.0.0.1:8081\n".to_owned()
            )
        );
        let _taken = http(world.host(), "127.0.0.1:8082");
        assert_eq!(
            expose(&json!({"local": "127.0.0.1:8082", "remote": "192.168.127.2:80"})),
            (
                500,
                "listen tcp 127.0.0.1:8082: bind: address already in use\n".to_owned()
            )
        );
        // The same forwards are `vnetctl`'s.
        assert_eq!(world.list(&["forward", "list"]).len(), 1);

        let unexpose = |local: &str| {
            let body = json!({"local": local, "protocol": "tcp"});
            ask(world, &peer.services, "/services/forwarder/unexpose", Some(&body))
        };
        assert_eq!(unexpose("127.0.0.1:8081"), (200, String::new()));
        assert_eq!(unexpose("127.0.0.1:8081"), (500, "proxy not found\n".to_owned()));
        assert_eq!(all(), json!([]));
        assert_eq!(fetch(), "");
    });
}

#[test]
fn forwards_of_the_configuration_are_listed_as_written_and_ended_by_that() {
    staged(
        forwards_of_the_configuration_are_listed_as_written_and_ended_by_that,
        |world| {
            let file = world.file(
                "c.yaml",
                "stack:\n  forwards: {\":8083\": \"192.168.127.2:80\"}\n",
            );
            let peer = Peer::start(world, "a", &["-config", file.to_str().unwrap()]);
            let all = || get(world, &peer.services, "/services/forwarder/all");
            assert_eq!(
                all(),
                json!([{"local": ":8083", "remote": "192.168.127.2:80", "protocol": "tcp"}])
            );
            assert!(std::net::TcpStream::connect("127.0.0.1:8083").is_ok());
            let body = json!({"local": ":8083", "protocol": "tcp"});
            let unexpose = || ask(world, &peer.services, "/services/forwarder/unexpose", Some(&body));
            assert_eq!(unexpose(), (200, String::new()));
            assert_eq!(all(), json!([]));
            assert!(std::net::TcpStream::connect("127.0.0.1:8083").is_err());
        },
    );
}

#[test]
fn a_unix_forward_serves_curl_and_deletes_no_file() {
    staged(a_unix_forward_serves_curl_and_deletes_no_file, |world| {
        let peer = Peer::start(world, "a", &[]);
        let page = "#!/bin/sh\nread request\nprintf 'HTTP/1.0 200 OK\\r\\n\\r\\nhello'\n";
        world.open_to_all(&world.file("page", page));
        let _guest = world.guest_script(
            &peer.qemu,
            "ping -c 1 -W 5 192.168.127.1 >/dev/null; exec socat tcp-listen:80,fork,reuseaddr exec:./page",
        );
        let file = world.file("precious", "do not delete");
        let path = world.runtime_dir().join("web.sock");
        let expose = |local: &Path| {
            let body =
                json!({"local": local.to_str(), "remote": "tcp://192.168.127.2:80", "protocol": "unix"});
            ask(world, &peer.services, "/services/forwarder/expose", Some(&body))
        };
        let (status, _) = expose(&file);
        assert_eq!(status, 500);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "do not delete");
        assert_eq!(expose(&path), (200, String::new()));
        let mut body = String::new();
        eventually("the guest answers", || {
            let mut curl = world.program("curl");
            curl.args(["-sS", "-m", "3", "--unix-socket"])
                .arg(&path)
                .arg("http://web/");
            body = Running::start(curl).wait().stdout;
            body == "hello"
        });
    });
}

#[test]
fn what_the_network_has_is_listed_and_names_are_added() {
    staged(what_the_network_has_is_listed_and_names_are_added, |world| {
        let peer = Peer::start(world, "a", &[]);
        let script = "ping -c 1 -W 5 192.168.127.1 >/dev/null; until [ -e go ]; do sleep 0.05; done; \
                      dig +short @192.168.127.1 X.TEST.internal; dig +short @192.168.127.1 other.test.internal";
        let mut running = world.guest_script(&peer.qemu, script);
        let leases = || get(world, &peer.listen, "/services/dhcp/leases");
        eventually("the guest is there", || {
            get(world, &peer.services, "/cam") != json!({})
        });
        assert_eq!(leases()["192.168.127.1"], "5a:94:ef:e4:0c:dd");
        assert_eq!(leases()["192.168.127.2"], "5a:94:ef:e4:0c:ee");
        assert_eq!(get(world, &peer.services, "/leases"), leases());
        assert_eq!(
            get(world, &peer.services, "/cam"),
            json!({"5a:94:ef:e4:0c:ee": 0})
        );
        assert!(get(world, &peer.services, "/stats")["TCP"].is_object());
        let zones = get(world, &peer.services, "/services/dns/all");
        let names: Vec<&str> = zones
            .as_array()
            .unwrap()
            .iter()
            .map(|zone| zone["Name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["containers.internal.", "docker.internal."]);
        let zone = json!({"Name": "test.internal.", "Records": [{"Name": "x", "IP": "192.0.2.1"}], "DefaultIP": "192.0.2.9"});
        assert_eq!(
            ask(world, &peer.services, "/services/dns/add", Some(&zone)),
            (200, String::new())
        );
        world.file("go", "");
        running.prints("192.0.2.1\n192.0.2.9\n");
        let (status, body) = ask(world, &peer.services, "/nowhere", None);
        assert_eq!((status, &*body), (404, "404 page not found\n"));
    });
}

#[test]
fn each_socket_is_of_its_own_network() {
    staged(each_socket_is_of_its_own_network, |world| {
        let [one, other] = ["a", "b"].map(|name| Peer::start(world, name, &[]));
        let _guest = world.guest_script(
            &one.qemu,
            "ping -c 1 -W 5 192.168.127.1 >/dev/null; exec sleep 60",
        );
        eventually("the guest is there", || {
            get(world, &one.services, "/cam") != json!({})
        });
        let body = json!({"local": "127.0.0.1:8081", "remote": "192.168.127.2:80"});
        assert_eq!(
            ask(world, &one.services, "/services/forwarder/expose", Some(&body)).0,
            200
        );
        assert_eq!(get(world, &other.services, "/services/forwarder/all"), json!([]));
        assert_eq!(get(world, &other.services, "/cam"), json!({}));
        let closing = json!({"local": "127.0.0.1:8081", "protocol": "tcp"});
        assert_eq!(
            ask(
                world,
                &other.services,
                "/services/forwarder/unexpose",
                Some(&closing)
            ),
            (500, "proxy not found\n".to_owned())
        );
        assert_eq!(
            get(world, &one.services, "/services/forwarder/all")
                .as_array()
                .unwrap()
                .len(),
            1
        );
        for peer in [one, other] {
            peer.running.signal(Signal::SIGTERM);
            assert_eq!(peer.running.wait().code, 0);
        }
    });
}

#[test]
fn a_tunnel_leads_to_the_guest_on_either_socket() {
    staged(a_tunnel_leads_to_the_guest_on_either_socket, |world| {
        let peer = Peer::start(world, "a", &[]);
        let _guest = world.guest_script(
            &peer.qemu,
            "ping -c 1 -W 5 192.168.127.1 >/dev/null; exec socat tcp-listen:7,fork,reuseaddr exec:cat",
        );
        for socket in [&peer.listen, &peer.services] {
            let mut said = String::new();
            eventually("the tunnel is there", || {
                let mut tunnel = UnixStream::connect(socket).unwrap();
                let request = b"POST /tunnel?ip=192.168.127.2&port=7 HTTP/1.1\r\nHost: x\r\n\r\nhello";
                tunnel.write_all(request).unwrap();
                tunnel.shutdown(std::net::Shutdown::Write).unwrap();
                said.clear();
                tunnel.read_to_string(&mut said).is_ok() && said == "OKhello"
            });
        }
    });
}

#[test]
fn no_guest_reaches_the_services_over_the_hosts_loopback() {
    staged(no_guest_reaches_the_services_over_the_hosts_loopback, |world| {
        let peer = Peer::start(world, "a", &["-services", "tcp://127.0.0.1:7777"]);
        let _server = http(world.host(), "127.0.0.1:7778");
        let mut curl = world.program("curl");
        curl.args(["-sS", "http://127.0.0.1:7777/services/forwarder/all"]);
        assert_eq!(Running::start(curl).wait().stdout.trim(), "[]");
        let fetch = "ping -c 1 -W 5 192.168.127.1 >/dev/null
            for port in 7778 7777; do curl -sS -m 5 -o /dev/null -w '%{http_code} ' http://192.168.127.254:$port/; done";
        let fetched = world.guest_script(&peer.qemu, fetch).wait();
        assert_eq!(fetched.stdout.trim(), "200 000", "{fetched:?}");
    });
}

#[test]
fn no_guest_reaches_what_another_network_listens_on() {
    staged(no_guest_reaches_what_another_network_listens_on, |world| {
        let a = Peer::start(world, "a", &["-services", "tcp://127.0.0.1:7770"]);
        let _first = http(world.host(), "127.0.0.1:7771");
        // The guest is there, and let out to the host's loopback, before the other network is.
        let fetch = "ping -c 1 -W 5 192.168.127.1 >/dev/null
            fetch() { curl -sS -m 5 -o /dev/null -w '%{http_code} ' http://192.168.127.254:$1/network/pending; }
            until fetch 7771; do sleep 0.1; done
            until fetch 7772 >/dev/null; do sleep 0.1; done
            for port in 7771 7777 7778 7779; do fetch $port; done";
        let mut early = world.guest_script(&a.qemu, fetch);
        early.prints("200");
        let b = [
            "-secure-mode",
            "-listen",
            "tcp://127.0.0.1:7777",
            "-listen-qemu",
            "tcp://127.0.0.1:7778",
            "-services",
            "tcp://127.0.0.1:7779",
        ];
        let _b = Peer::start(world, "b", &b);
        for port in [7777, 7779] {
            let mut curl = world.program("curl");
            curl.args(["-sS", "-o", "/dev/null", "-w", "%{http_code}"]);
            curl.arg(format!("http://127.0.0.1:{port}/services/forwarder/all"));
            let code = Running::start(curl).wait().stdout;
            assert_ne!(code, "000", "the host reaches {port}");
        }
        let _second = http(world.host(), "127.0.0.1:7772");
        let fetched = early.wait();
        assert!(fetched.stdout.trim().ends_with("200 000 000 000"), "{fetched:?}");
        let late = "ping -c 1 -W 5 192.168.127.1 >/dev/null
            for port in 7771 7777 7778 7779; do
                curl -sS -m 5 -o /dev/null -w '%{http_code} ' http://192.168.127.254:$port/network/pending
            done";
        let fetched = world.guest_script(&a.qemu, late).wait();
        assert_eq!(fetched.stdout.trim(), "200 000 000 000", "{fetched:?}");
    });
}

#[test]
fn in_secure_mode_what_a_vm_can_reach_serves_no_verb() {
    staged(in_secure_mode_what_a_vm_can_reach_serves_no_verb, |world| {
        let peer = Peer::start(world, "a", &["-secure-mode"]);
        let forward = json!({"local": "127.0.0.1:8081", "remote": "192.168.127.2:80"});
        let zone = json!({"Name": "github.com."});
        let target = json!({"protocol": "tcp", "ip": "203.0.113.10", "port": 80});
        for (path, body) in [
            ("/services/forwarder/all", None),
            ("/services/forwarder/expose", Some(&forward)),
            ("/services/forwarder/unexpose", Some(&forward)),
            ("/services/dns/all", None),
            ("/services/dns/add", Some(&zone)),
        ] {
            let (status, said) = ask(world, &peer.listen, path, body);
            assert_eq!(status, 403, "{path}: {said}");
            assert!(said.contains("-services"), "{path}: {said}");
        }
        for (path, body) in [
            ("/network/pending", None),
            ("/network/allow", Some(&target)),
            ("/services/network/allow", Some(&target)),
            ("/network/events", None),
            ("/dns/allow", Some(&json!({"domain": "github.com"}))),
            ("/dns/pending", None),
        ] {
            let (status, said) = ask(world, &peer.listen, path, body);
            let no_approval = "not on a socket that a VM can reach: use the one of -services\n";
            assert_eq!((status, said.as_str()), (403, no_approval), "{path}");
        }
        assert_eq!(get(world, &peer.services, "/services/forwarder/all"), json!([]));
    });
}

/// What a guest gets when it exposes a port, and the status.
const EXPOSE: &str = "curl -sS -m 5 -w '%{http_code}' -d '{\"local\":\"127.0.0.1:8081\",\"remote\":\":80\"}' \
                      http://192.168.127.1/services/forwarder/expose";

#[test]
fn a_guest_that_is_served_under_a_policy_exposes_nothing_that_it_does_not_allow() {
    staged(
        a_guest_that_is_served_under_a_policy_exposes_nothing_that_it_does_not_allow,
        |world| {
            let policy = world.file("policy.yaml", "version: 1\n").display().to_string();
            let peer = Peer::start(world, "a", &["-network-policy", &policy]);
            let posted = world.guest_script(&peer.qemu, EXPOSE).wait();
            assert_eq!(
                posted.stdout, "tcp 127.0.0.1:8081 is not opened: no rule of forwards: allows it\n403",
                "{posted:?}"
            );
            assert_eq!(get(world, &peer.services, "/services/forwarder/all"), json!([]));
        },
    );
}

#[test]
fn a_guest_that_is_not_served_finds_the_gateways_port_closed() {
    staged(
        a_guest_that_is_not_served_finds_the_gateways_port_closed,
        |world| {
            let peer = Peer::with(world, "a", &[], &[("VNET_GUEST_API", "off")]);
            let posted = world.guest_script(&peer.qemu, EXPOSE).wait();
            assert_eq!(posted.stdout, "000", "{posted:?}");
            assert!(
                posted.stderr.contains("Connection refused") || posted.stderr.contains("Couldn't connect"),
                "{posted:?}"
            );
            assert_eq!(get(world, &peer.services, "/services/forwarder/all"), json!([]));
        },
    );
}

#[test]
fn a_question_is_answered_and_followed_by_curl() {
    staged(a_question_is_answered_and_followed_by_curl, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let peer = Peer::start(world, "a", &["-secure-mode"]);
        let mut events = world.program("curl");
        events.args(["-sSN", "--unix-socket"]).arg(&peer.services);
        events.arg("http://vnet/network/events");
        let mut events = Running::start(events);
        events.prints("event: init");
        let fetching = world.guest_script(&peer.qemu, "curl -sS -m 25 http://203.0.113.10/");
        events.prints("event: network_pending");
        let pending = get(world, &peer.services, "/network/pending");
        assert_eq!(
            (&pending[0]["protocol"], &pending[0]["ip"], &pending[0]["port"]),
            (&json!("tcp"), &json!("203.0.113.10"), &json!(80)),
            "{pending}"
        );
        let target = json!({"protocol": "tcp", "ip": "203.0.113.10", "port": 80});
        let (status, said) = ask(world, &peer.services, "/services/network/allow", Some(&target));
        assert_eq!(status, 200, "{said}");
        assert_eq!(fetching.wait().code, 0);
        assert_eq!(server.connections(), 1);
        let stream = events.prints("event: network_approved");
        assert!(stream.contains("\nid: "), "{stream}");
    });
}
