//! Ways round the policy by DNS: other servers, and data under names that are allowed.
#![cfg(target_os = "linux")]

use vnet_tests::servers::http;
use vnet_tests::{Answer, Dns, Running, World, eventually, staged};

fn dns_at(world: &World, address: &str) -> Dns {
    Dns::serve(
        world.internet(),
        address,
        &[("web.example.com", Answer::A("203.0.113.10"))],
    )
}

/// Everything that `dig` would get from another server: over UDP and TCP, on DNS's own port and others.
const WAYS: &str = "for way in '' +tcp '-p 853' '-p 853 +tcp' '-p 5353' '-p 5355'; do \
                    dig $way +tries=1 +time=2 +short @198.51.100.7 web.example.com; done; echo end";

#[test]
fn dns_to_another_server_is_not_opened_by_a_default_allow_and_the_event_says_which_guard() {
    staged(
        dns_to_another_server_is_not_opened_by_a_default_allow_and_the_event_says_which_guard,
        |world| {
            let upstream = dns_at(world, "203.0.113.10:53");
            let others: Vec<Dns> = [53, 853, 5353, 5355]
                .map(|port| dns_at(world, &format!("198.51.100.7:{port}")))
                .into();
            let file = world.file("open.yaml", "version: 1\ndefaultAction: allow\n");
            let flags = ["--network-policy", file.to_str().unwrap()];
            let ended = world.script(&flags, WAYS);
            let answers: Vec<&str> = ended
                .stdout
                .lines()
                .filter(|line| !line.starts_with(';'))
                .collect();
            assert_eq!(answers, ["end"], "{ended:?}");
            for other in &others {
                assert_eq!(other.asked(), Vec::<String>::new());
            }
            let denied = world.list(&["events", "list"]);
            let by_guard = denied.iter().filter(|event| event["reason"]["step"] == "guard");
            let subjects: Vec<&str> = by_guard
                .filter_map(|event| event["reason"]["subject"].as_str())
                .collect();
            assert!(
                subjects.len() >= 6 && subjects.iter().all(|subject| *subject == "dns"),
                "{denied:?}"
            );
            // The gateway's own answers, and a resolver's name is not among them.
            let ended = world.script(
                &flags,
                "dig +short web.example.com; dig dns.google | grep -c 'status: REFUSED'",
            );
            assert_eq!(ended.stdout, "203.0.113.10\n1\n", "{ended:?}");
            assert_eq!(
                (
                    upstream.asked_for("web.example.com"),
                    upstream.asked_for("dns.google")
                ),
                (1, 0)
            );
        },
    );
}

#[test]
fn dns_to_another_server_is_answered_by_the_gateway_where_the_policy_redirects_it() {
    staged(
        dns_to_another_server_is_answered_by_the_gateway_where_the_policy_redirects_it,
        |world| {
            let upstream = dns_at(world, "203.0.113.10:53");
            let other = dns_at(world, "198.51.100.7:53");
            let document = "version: 1\nguards: {dns: redirect}\ndns: {allowedDomains: [web.example.com], denyWith: nxdomain}\n";
            let file = world.file("redirect.yaml", document);
            let ended = world.script(
                &["--network-policy", file.to_str().unwrap()],
                "dig +short @198.51.100.7 web.example.com; dig +tcp +short @198.51.100.7 web.example.com; \
                 dig @198.51.100.7 x.example.com | grep -c 'status: NXDOMAIN'",
            );
            assert_eq!(ended.stdout, "203.0.113.10\n203.0.113.10\n1\n", "{ended:?}");
            assert_eq!(other.asked(), Vec::<String>::new());
            assert_eq!(
                (
                    upstream.asked_for("web.example.com"),
                    upstream.asked_for("x.example.com")
                ),
                (2, 0)
            );
        },
    );
}

#[test]
fn a_lookup_of_a_vm_is_held_for_four_seconds_then_fails_and_the_question_stays_open() {
    staged(
        a_lookup_of_a_vm_is_held_for_four_seconds_then_fails_and_the_question_stays_open,
        |world| {
            let upstream = dns_at(world, "203.0.113.10:53");
            let (_up, socket) = world.up(&["--secure-mode"]);
            let mut guest = world.load();
            guest.args(["guest", "--socket", &socket, "--", "sh", "-c"]);
            guest.arg(
                "dig +time=10 +tries=1 @192.168.127.1 web.example.com; echo first; \
                 until [ -e go ]; do sleep 0.05; done; dig +short @192.168.127.1 web.example.com",
            );
            let mut guest = Running::start(guest);
            let said = guest.prints("first\n");
            assert!(
                said.contains("status: SERVFAIL") && said.contains("EDE: "),
                "{said}"
            );
            let (_, milliseconds) = said.split_once("Query time: ").expect("dig says how long");
            let milliseconds: u64 = milliseconds.split(' ').next().unwrap().parse().unwrap();
            assert!(
                (3_500..8_000).contains(&milliseconds),
                "held for {milliseconds} ms"
            );
            assert_eq!(upstream.asked(), Vec::<String>::new());
            // A late yes serves the next attempt.
            let pending = world.pending();
            assert_eq!(pending.len(), 1, "{pending:?}");
            world.vnetctl(&["approve", &vnet_tests::id(&pending[0])]);
            world.file("go", "");
            let ended = guest.wait();
            assert!(ended.stdout.ends_with("first\n203.0.113.10\n"), "{ended:?}");
        },
    );
}

#[test]
fn ten_thousand_names_below_an_allowed_one_send_no_more_upstream_than_the_limit() {
    staged(
        ten_thousand_names_below_an_allowed_one_send_no_more_upstream_than_the_limit,
        |world| {
            let upstream = dns_at(world, "203.0.113.10:53");
            let document = "version: 1\ndns:\n  allowedDomains: [\"*.example.com\"]\n  limits: {queriesPerSecond: 20000, queriesPerMinute: 20000, namesPerDomain: 50}\n";
            let file = world.file("limited.yaml", document);
            let tunnel = "import socket, struct, sys, time\n\
                s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                s.connect(('192.168.127.1', 53)); s.settimeout(5)\n\
                answered = 0\n\
                for n in range(10000):\n\
                \x20 label = ('d%08x' % (n * 2654435761 % 2**32)).encode()\n\
                \x20 q = struct.pack('>HHHHHH', n, 0x100, 1, 0, 0, 0)\n\
                \x20 q += bytes([len(label)]) + label + b'\\x07example\\x03com\\0' + struct.pack('>HH', 16, 1)\n\
                \x20 s.send(q)\n\
                \x20 s.recv(2000); answered += 1\n\
                print(answered); time.sleep(2)\n";
            let ended = world.script(
                &["--vm", "web", "--network-policy", file.to_str().unwrap()],
                &format!("python3 -c \"{tunnel}\""),
            );
            assert_eq!(ended.stdout, "10000\n", "{ended:?}");
            let asked = upstream.asked().len();
            assert!((1..=50).contains(&asked), "{asked} questions went upstream");
            eventually("the limit to be told", || {
                world.list(&["events", "list"]).iter().any(|event| {
                    let text = event["text"].as_str().unwrap_or_default();
                    event["kind"] == "EVENT_KIND_LIMIT_REACHED"
                        && text.starts_with("dns.limits.namesPerDomain (50) is reached for example.com")
                })
            });
        },
    );
}

#[test]
fn a_name_whose_alias_is_blocked_is_denied_and_another_is_one_question() {
    staged(
        a_name_whose_alias_is_blocked_is_denied_and_another_is_one_question,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let upstream = Dns::serve(
                world.internet(),
                "203.0.113.10:53",
                &[
                    ("shop.example.com", Answer::Cname("t.cdn.example.net")),
                    ("t.cdn.example.net", Answer::Cname("x.tracker.example")),
                    ("x.tracker.example", Answer::A("203.0.113.10")),
                    ("web.example.com", Answer::Cname("w.cdn.example.net")),
                    ("w.cdn.example.net", Answer::A("203.0.113.10")),
                ],
            );
            let document = "version: 1\ndns: {allowedDomains: [\"*.example.com\"], blockedDomains: [\"*.tracker.example\"]}\n";
            let file = world.file("blocked.yaml", document);
            let ended = world.script(
                &["--network-policy", file.to_str().unwrap()],
                "dig shop.example.com | grep -e 'status: REFUSED' -e 'EDE: 15' | grep -c .; \
                 dig +tcp shop.example.com AAAA | grep -c 'x.tracker.example, an alias of it, is refused'; \
                 curl -sS --max-time 5 --resolve shop.example.com:80:203.0.113.10 http://shop.example.com/; echo $?; \
                 curl -sS http://web.example.com/",
            );
            assert_eq!(
                ended.stdout, "2\n1\n7\nthis is 203.0.113.10:80 at /\n",
                "{ended:?}"
            );
            assert_eq!(server.connections(), 1);
            assert!(upstream.asked_for("shop.example.com") >= 2);
            let denied = world.list(&["events", "list", "--kind", "dns-denied"]);
            assert!(!denied.is_empty());
            for event in &denied {
                assert_eq!(event["reason"]["subject"], "dns.blockedDomains", "{event:?}");
            }

            // Where a person is asked, they are asked about the name and never about what it leads through.
            let document = "version: 1\nmode: ask\ndns: {blockedDomains: [\"*.tracker.example\"]}\n";
            let file = world.file("asking.yaml", document);
            let flags = ["--network-policy", file.to_str().unwrap()];
            let run = world.run(&flags, &["curl", "-sS", "http://web.example.com/"]);
            let request = world.first_pending();
            assert_eq!(
                request["target"]["name"]["name"], "web.example.com",
                "{request:?}"
            );
            world.vnetctl(&["approve", request["id"].as_str().unwrap()]);
            assert_eq!(run.wait().stdout, "this is 203.0.113.10:80 at /\n");
            assert!(world.list(&["pending", "list"]).is_empty());

            let mut run = world.run(
                &[&flags[..], &["--vm", "shop"]].concat(),
                &[
                    "sh",
                    "-c",
                    "curl -sS http://shop.example.com/; echo $?; exec sleep 60",
                ],
            );
            let request = world.first_pending();
            world.vnetctl(&["approve", request["id"].as_str().unwrap()]);
            run.prints("6\n");
            let denied = world.list(&["dns", "denied"]);
            assert!(
                denied.iter().any(|denied| denied["name"] == "shop.example.com"
                    && denied["reason"]["text"]
                        .as_str()
                        .is_some_and(|text| text.starts_with("x.tracker.example, an alias of it"))),
                "{denied:?}"
            );
            assert!(world.list(&["pending", "list"]).is_empty());
        },
    );
}
