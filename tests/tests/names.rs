//! Names that mean what they say: what a connection speaks of its name is what its rule named, or it goes nowhere.
//!
//! Two names lead to one address here, as on any shared host, and a rule names one of them.
#![cfg(target_os = "linux")]

use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use vnet_tests::servers::inside;
use vnet_tests::{Answer, Dns, Server, World, eventually, http, id, staged, tcp, udp_echo};

const POLICY: &str = "version: 1\nrules:\n  - {name: shared, action: allow, domains: [allowed.test]}\n";
/// curl: the TLS handshake failed.
const NO_TLS: &str = "35";
/// curl: it received no answer.
const NO_ANSWER: &str = "56";
/// What happens at once takes no longer, on a loaded machine; less than a name may take.
const AT_ONCE: Duration = Duration::from_secs(4);
/// A client's first QUIC packet, which names example.com: RFC 9001 appendix A.2.
const QUIC_TO_EXAMPLE_COM: &str = include_str!("../../dataplane/src/engine/inspect/quic/rfc9001-a2.hex");

/// Makes a TLS hello for a name, `hello('allowed.test')`, and a connection, `to(443)`.
const PRELUDE: &str = "\
import os, socket, ssl, sys, time
def hello(name):
    context = ssl.create_default_context()
    sent = ssl.MemoryBIO()
    try: context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name).do_handshake()
    except ssl.SSLWantReadError: pass
    return sent.read()
def to(port, kind=socket.SOCK_STREAM):
    s = socket.socket(socket.AF_INET, kind)
    s.settimeout(20)
    s.connect((socket.gethostbyname('allowed.test'), port))
    if kind == socket.SOCK_STREAM: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s
def heard(s):
    try: return s.recv(9999) or 'closed'
    except ConnectionError: return 'reset'
def page(s):
    got = b''
    while not (b' at ' in got and got.endswith(b'\\n')): got += s.recv(9999)
    return got[:15]
def say(*what):
    print(*what, flush=True)
";

fn dns(world: &World) -> Dns {
    let all = ["allowed.test", "denied.test", "example.com"];
    let known = all.map(|name| (name, Answer::A("203.0.113.10")));
    Dns::serve(world.internet(), "203.0.113.10:53", &known)
}

/// A server that keeps what it is sent, and answers every piece of it with a byte.
fn listening(world: &World, address: &str) -> (Server, Arc<Mutex<Vec<u8>>>) {
    let kept: Arc<Mutex<Vec<u8>>> = Arc::default();
    let own = Arc::clone(&kept);
    let server = tcp(world.internet(), address, move |mut stream, _| {
        let mut piece = [0; 4096];
        while let Ok(length @ 1..) = stream.read(&mut piece) {
            own.lock().unwrap().extend_from_slice(&piece[..length]);
            if stream.write_all(b".").is_err() {
                return;
            }
        }
    });
    (server, kept)
}

/// Runs a script of Python's under the policy and gives what it prints.
fn python(world: &World, policy: &str, script: &str) -> String {
    let file = world.file("names.yaml", policy);
    let flags = ["--vm", "web", "--network-policy", file.to_str().unwrap()];
    let ended = world
        .run(&flags, &["python3", "-c", &format!("{PRELUDE}{script}")])
        .wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    ended.stdout
}

/// Starts a program among the servers; it ends with the test.
fn start_there(world: &World, mut command: Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    inside(world.internet(), move || command.spawn().unwrap())
}

/// Waits for the first refusal of a name.
fn refusal(world: &World) -> Value {
    let mut found = None;
    eventually("a refusal is told", || {
        let events = world.list(&["events", "list", "--kind", "flow-denied"]);
        found = events.into_iter().find(|event| event["reason"]["step"] == "name");
        found.is_some()
    });
    found.unwrap_or_default()
}

#[test]
fn on_a_shared_address_only_the_name_of_the_rule_gets_through() {
    staged(
        on_a_shared_address_only_the_name_of_the_rule_gets_through,
        |world| {
            dns(world);
            let (tls, _) = listening(world, "203.0.113.10:443");
            let web = http(world.internet(), "203.0.113.10:80");
            let file = world.file("names.yaml", POLICY);
            let ended = world.script(
                &["--vm", "web", "--network-policy", file.to_str().unwrap()],
                "getent hosts allowed.test >bound; \
             curl -skS --resolve denied.test:443:203.0.113.10 https://denied.test/; echo $?; \
             curl -skS https://203.0.113.10/; echo $?; \
             curl -sS -H 'Host: denied.test' http://203.0.113.10/; echo $?; \
             curl -sS http://203.0.113.10/; echo $?; \
             curl -sS http://denied.test/ 2>&1 | head -c 0; \
             curl -sS http://allowed.test/; curl -sS http://ALLOWED.test:80/again",
            );
            assert_eq!(
                ended.stdout,
                format!(
                    "{NO_TLS}\n{NO_TLS}\n{NO_ANSWER}\n{NO_ANSWER}\nthis is 203.0.113.10:80 at /\nthis is \
                 203.0.113.10:80 at /again\n"
                ),
                "{ended:?}"
            );
            assert_eq!(
                tls.connections(),
                0,
                "nothing was dialled for another name or none"
            );
            assert_eq!((web.connections(), web.requests()), (2, 2));

            let denied = world.list(&["events", "list", "--vm", "web", "--kind", "flow-denied"]);
            let texts: Vec<&str> = denied.iter().filter_map(|e| e["text"].as_str()).collect();
            for expected in [
                "tcp 203.0.113.10:443: TLS names denied.test at port 443, which the rule or grant does not name; it \
             rests on allowed.test",
                "tcp 203.0.113.10:443: TLS names no host (expected one that the rule or grant names); it rests on \
             allowed.test",
                "tcp 203.0.113.10:80: HTTP names denied.test at port 80, which the rule or grant does not name; it \
             rests on allowed.test",
            ] {
                assert!(texts.contains(&expected), "{texts:#?}");
            }
            assert!(
                denied.iter().any(|e| e["spokenName"] == "denied.test"),
                "{denied:?}"
            );
            let closed = world.list(&["events", "list", "--vm", "web", "--kind", "flow-closed"]);
            let refused = |e: &&Value| {
                e["text"]
                    .as_str()
                    .is_some_and(|text| text.ends_with("was refused for its name"))
            };
            assert_eq!(closed.iter().filter(refused).count(), 4, "{closed:?}");
        },
    );
}

#[test]
fn a_real_tls_connection_and_http_over_it_work_under_their_name() {
    staged(
        a_real_tls_connection_and_http_over_it_work_under_their_name,
        |world| {
            dns(world);
            let made = world
                .program("openssl")
                .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"])
                .args([
                    "-subj",
                    "/CN=allowed.test",
                    "-keyout",
                    "key.pem",
                    "-out",
                    "cert.pem",
                ])
                .output()
                .unwrap();
            assert!(made.status.success(), "{made:?}");
            let mut server = world.program("openssl");
            server.args(["s_server", "-accept", "203.0.113.10:443", "-www"]);
            server.args(["-key", "key.pem", "-cert", "cert.pem"]);
            let mut server = start_there(world, server);
            let file = world.file("names.yaml", POLICY);
            // The server may not listen yet: the guest was answered, so curl sees a reset.
            let ended = world.script(
                &["--network-policy", file.to_str().unwrap()],
                "for i in $(seq 200); do curl -skS https://allowed.test/ >page 2>/dev/null && break; sleep 0.1; done; \
                 grep -c 'Ciphers supported' page; \
                 curl -skS --resolve denied.test:443:203.0.113.10 https://denied.test/; echo $?; \
                 echo | openssl s_client -connect allowed.test:443 -servername allowed.test 2>/dev/null | grep -c '^subject=.*allowed.test'",
            );
            server.kill().unwrap();
            server.wait().unwrap();
            assert_eq!(ended.stdout, format!("1\n{NO_TLS}\n1\n"), "{ended:?}");
        },
    );
}

#[test]
fn a_name_in_segments_of_one_byte_is_read_and_nothing_arrives_before_it_is_whole() {
    staged(
        a_name_in_segments_of_one_byte_is_read_and_nothing_arrives_before_it_is_whole,
        |world| {
            dns(world);
            let (server, kept) = listening(world, "203.0.113.10:443");
            let said = python(
                world,
                POLICY,
                "
for name in ('denied.test', 'allowed.test'):
    s = to(443)
    said = hello(name)
    try:
        for byte in said: s.send(bytes([byte]))
        say(len(said), heard(s))
    except ConnectionError: say(len(said), 'reset')
",
            );
            let lines: Vec<&str> = said.lines().collect();
            let length: usize = lines[1].split(' ').next().unwrap().parse().unwrap();
            assert!(lines[0].ends_with(" reset") && lines[1].contains("b'."), "{said}");
            assert_eq!(server.connections(), 1, "the denied name never got a connection");
            eventually("the whole hello is there", || {
                kept.lock().unwrap().len() == length
            });
            assert!(
                kept.lock()
                    .unwrap()
                    .windows(12)
                    .any(|part| part == b"allowed.test")
            );
        },
    );
}

#[test]
fn silence_where_a_name_is_required_is_denied_after_five_seconds() {
    staged(
        silence_where_a_name_is_required_is_denied_after_five_seconds,
        |world| {
            dns(world);
            let (server, _) = listening(world, "203.0.113.10:443");
            let said = python(
                world,
                POLICY,
                "
for part in (b'', hello('allowed.test')[:50]):
    began = time.monotonic()
    s = to(443)
    s.send(part)
    say(heard(s), 5 <= time.monotonic() - began < 15)
",
            );
            assert_eq!(said, "reset True\nreset True\n");
            assert_eq!(server.connections(), 0);
            let event = refusal(world);
            assert_eq!(event["reason"]["subject"], "name_late", "{event}");
            assert!(
            event["text"].as_str().unwrap().starts_with(
                "tcp 203.0.113.10:443: no whole name came within 5 s (expected a TLS or QUIC hello, or an HTTP request)"
            ),
            "{event}"
        );
        },
    );
}

#[test]
fn ssh_and_git_under_a_rule_with_a_name_lose_no_time() {
    staged(ssh_and_git_under_a_rule_with_a_name_lose_no_time, |world| {
        dns(world);
        let heard: Arc<Mutex<Vec<u8>>> = Arc::default();
        let own = Arc::clone(&heard);
        let server = tcp(world.internet(), "203.0.113.10:22", move |mut stream, _| {
            let _ = stream.write_all(b"SSH-2.0-speaks_first\r\n");
            let mut said = [0; 256];
            if let Ok(length) = stream.read(&mut said) {
                own.lock().unwrap().extend_from_slice(&said[..length]);
            }
        });
        let repository = world.work().join("repository");
        let mut init = world.program("git");
        init.args(["init", "-q", "--bare"]).arg(&repository);
        assert!(init.status().unwrap().success());
        let mut daemon = world.program("git");
        daemon.args(["daemon", "--listen=203.0.113.10", "--export-all", "--reuseaddr"]);
        daemon.arg(format!("--base-path={}", world.work().display()));
        let mut daemon = start_there(world, daemon);

        let file = world.file("names.yaml", POLICY);
        let flags = ["--network-policy", file.to_str().unwrap()];
        let ssh = "ssh -v -F none -o BatchMode=yes -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no \
                   -o ConnectTimeout=20 allowed.test true";
        let ended = world.script(&flags, ssh);
        assert!(
            ended.stderr.contains("remote software version speaks_first"),
            "{ended:?}"
        );
        assert!(ended.took < AT_ONCE, "{ended:?}");
        assert_eq!(server.connections(), 1);
        assert!(heard.lock().unwrap().starts_with(b"SSH-2.0-"));

        let git = "for i in $(seq 100); do t=$(date +%s%N); git ls-remote git://allowed.test/repository && break; \
                   sleep 0.1; done 2>/dev/null; echo $(( ($(date +%s%N) - t) / 1000000 ))";
        let ended = world.script(&flags, git);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        let took: u128 = ended.stdout.trim().parse().unwrap();
        assert!(took < AT_ONCE.as_millis(), "{ended:?}");
        assert!(!ended.stdout.contains("fatal"), "{ended:?}");

        // What speaks a name there must speak that one.
        let (tls, _) = listening(world, "203.0.113.10:8443");
        let said = python(
            world,
            POLICY,
            "s = to(8443)\ns.send(hello('denied.test'))\nsay(heard(s))\n",
        );
        assert_eq!(said, "reset\n");
        eventually("it was dialled on the address alone", || tls.connections() == 1);
        assert_eq!(refusal(world)["spokenName"], "denied.test");
    });
}

#[test]
fn git_over_ssh_goes_out_under_a_grant_for_its_name() {
    staged(git_over_ssh_goes_out_under_a_grant_for_its_name, |world| {
        dns(world);
        let server = tcp(world.internet(), "203.0.113.10:22", |mut stream, _| {
            let _ = stream.write_all(b"SSH-2.0-speaks_first\r\n");
            let _ = stream.read(&mut [0; 256]);
        });
        world.vnetctl(&["allow", "domain", "allowed.test:22", "--vm", "web"]);
        let git = "export GIT_SSH_COMMAND='ssh -v -F none -o BatchMode=yes -o UserKnownHostsFile=/dev/null \
                   -o StrictHostKeyChecking=no -o ConnectTimeout=20'
                   git ls-remote ssh://git@allowed.test/repository; git ls-remote ssh://git@denied.test/repository";
        let run = world.run(&["--secure-mode", "--vm", "web"], &["sh", "-c", git]);
        // The other name on that address is asked about; the first was not.
        let request = world.first_pending();
        assert!(request["target"].to_string().contains("denied.test"), "{request}");
        assert_eq!(server.connections(), 1);
        world.vnetctl(&["deny", &id(&request)]);
        let ended = run.wait();
        let reached = "remote software version speaks_first";
        assert_eq!(ended.stderr.matches(reached).count(), 1, "{ended:?}");
        assert_eq!(ended.stderr.matches("asks for").count(), 1, "{ended:?}");
        assert_eq!(server.connections(), 1);
    });
}

#[test]
fn a_later_request_for_another_host_ends_the_connection_and_does_not_arrive() {
    staged(
        a_later_request_for_another_host_ends_the_connection_and_does_not_arrive,
        |world| {
            dns(world);
            let server = http(world.internet(), "203.0.113.10:80");
            let said = python(
                world,
                &POLICY.replace("[allowed.test]", "[allowed.test], ports: [80]"),
                "
def get(host): return b'GET /%s HTTP/1.1\\r\\nHost: %s\\r\\n\\r\\n' % (host, host)
s = to(80)
for host in (b'allowed.test', b'allowed.test', b'denied.test'):
    s.send(get(host))
    say(heard(s) if host == b'denied.test' else page(s))
for refused in (get(b'allowed.test') + get(b'denied.test'), b'CONNECT allowed.test:22 HTTP/1.1\\r\\nHost: allowed.test\\r\\n\\r\\n',
                b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n', b'GET http://denied.test/ HTTP/1.1\\r\\nHost: allowed.test\\r\\n\\r\\n',
                b'GET / HTTP/1.1\\r\\nHost: allowed.test\\r\\nHost: denied.test\\r\\n\\r\\n'):
    s = to(80)
    s.send(refused)
    say(heard(s))
",
            );
            assert_eq!(
                said,
                "b'HTTP/1.1 200 OK'\nb'HTTP/1.1 200 OK'\nreset\nreset\nreset\nreset\nreset\nreset\n"
            );
            assert_eq!(
                (server.connections(), server.requests()),
                (1, 2),
                "two requests arrived, and none for another host"
            );
        },
    );
}

#[test]
fn quic_goes_out_under_its_name_and_not_under_another() {
    staged(quic_goes_out_under_its_name_and_not_under_another, |world| {
        dns(world);
        let server = udp_echo(world.internet(), "203.0.113.10:443");
        let script = format!(
            "
s = to(443, socket.SOCK_DGRAM)
s.settimeout(3)
s.send(bytes.fromhex('{}'))
try: say(len(s.recv(9999)))
except TimeoutError: say('nothing')
except OSError as error: say('told', error.errno in (13, 113))
",
            QUIC_TO_EXAMPLE_COM.replace('\n', "")
        );
        assert_eq!(python(world, POLICY, &script), "told True\n");
        assert_eq!(server.requests(), 0);
        let event = refusal(world);
        assert_eq!(event["spokenName"], "example.com", "{event}");
        let named = POLICY.replace("[allowed.test]", "[allowed.test, example.com]");
        let looked_up = format!("socket.gethostbyname('example.com')\n{script}");
        assert_eq!(python(world, &named, &looked_up), "1200\n");
        assert_eq!(server.requests(), 1);
        let denied = format!("{named}guards: {{quic: deny}}\n");
        assert_eq!(python(world, &denied, &looked_up), "told True\n");
        assert_eq!(server.requests(), 1);
    });
}

#[test]
fn what_is_taken_back_while_a_name_is_read_is_not_dialled_and_what_still_stands_is() {
    staged(
        what_is_taken_back_while_a_name_is_read_is_not_dialled_and_what_still_stands_is,
        |world| {
            dns(world);
            let (server, kept) = listening(world, "203.0.113.10:443");
            let script = format!(
                "{PRELUDE}
for turn in ('first', 'second'):
    s = to(443)
    said = hello('allowed.test')
    s.send(said[:30])
    say(turn, 'connected')
    while not os.path.exists(turn): time.sleep(0.01)
    try:
        s.send(said[30:])
        say(turn, heard(s))
    except OSError: say(turn, 'reset')
"
            );
            let mut run = world.run(&["--secure-mode", "--vm", "web"], &["python3", "-c", &script]);
            // Held at its lookup: the answer to a name is for its connections too.
            world.vnetctl(&["approve", &world.first_pending_id(), "--scope", "name"]);
            run.prints("first connected");
            // The epoch is another: what stood for the guest is asked for anew, and stands.
            world.vnetctl(&["allow", "tcp", "192.0.2.9:9", "--vm", "web"]);
            world.file("first", "");
            run.prints("first b'.");
            assert_eq!(server.connections(), 1);
            let before = kept.lock().unwrap().len();
            run.prints("second connected");
            let grants = world.list(&["grants", "list"]);
            let named = grants
                .iter()
                .find(|grant| grant.to_string().contains("allowed.test"))
                .unwrap();
            world.vnetctl(&["grants", "revoke", &id(named)]);
            world.file("second", "");
            run.prints("second reset");
            assert_eq!(
                server.connections(),
                1,
                "nothing was dialled on what was taken back"
            );
            assert_eq!(kept.lock().unwrap().len(), before);
        },
    );
}

#[test]
fn nothing_of_what_a_guest_says_to_a_server_is_written_down() {
    staged(
        nothing_of_what_a_guest_says_to_a_server_is_written_down,
        |world| {
            dns(world);
            let server = http(world.internet(), "203.0.113.10:80");
            let file = world.file("names.yaml", POLICY);
            let said = "-H 'Authorization: Bearer hush-in-a-head' -d hush-in-a-body";
            let ended = world.script(
                &["--vm", "web", "--network-policy", file.to_str().unwrap()],
                &format!(
                    "curl -sS {said} http://allowed.test/hush-in-a-path; \
                 curl -sS {said} -H 'Host: denied.test' http://allowed.test/hush-in-a-path; echo $?"
                ),
            );
            assert!(ended.stdout.ends_with(&format!("{NO_ANSWER}\n")), "{ended:?}");
            assert!(server.requests() >= 1);
            refusal(world);
            world.stop_controlplane();
            let mut written = Vec::new();
            let mut places = vec![world.state_dir(), world.runtime_dir()];
            while let Some(place) = places.pop() {
                for entry in std::fs::read_dir(place).unwrap() {
                    let entry = entry.unwrap();
                    let kind = entry.file_type().unwrap();
                    if kind.is_dir() {
                        places.push(entry.path());
                    } else if kind.is_file() {
                        written.extend(std::fs::read(entry.path()).unwrap());
                    }
                }
            }
            written.extend(ended.stderr.bytes());
            let written = String::from_utf8_lossy(&written);
            assert!(written.contains("denied.test"), "the refusal is recorded");
            assert!(!written.contains("hush"), "and what was said is not");
        },
    );
}
