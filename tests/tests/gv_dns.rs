//! DNS as the host has it, and the faults of gvproxy's that a guest would meet: with a real `dig` against servers of
//! its own.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use vnet_tests::authority::{soa, wire_name};
use vnet_tests::{Answer, Authority, Dns, Ended, Running, World, eventually, staged};

const SERVER: &str = "203.0.113.10:53";

/// A server with a record of every type that somebody missed, and one that nobody knows.
fn authority(world: &World) -> Authority {
    let text = |parts: &[&str]| -> Vec<u8> {
        parts
            .iter()
            .flat_map(|part| [&[u8::try_from(part.len()).unwrap()][..], part.as_bytes()].concat())
            .collect()
    };
    let (long, longer) = ("a".repeat(255), "b".repeat(255));
    let service = |target: &str| [&[0, 1, 0, 2, 0x01, 0xbb][..], &wire_name(target)].concat();
    let binding = [
        &[0, 1][..],
        &wire_name("web.example.com"),
        &[0, 1, 0, 3, 2, b'h', b'2'],
    ]
    .concat();
    let signature = [
        &[0, 1, 13, 3, 0, 0, 0, 60, 0x70, 0, 0, 0, 0x60, 0, 0, 0, 0, 42][..],
        &wire_name("example.com"),
        &[7; 64],
    ]
    .concat();
    let mut authority = Authority::default()
        .with("web.example.com", A, vec![203, 0, 113, 10])
        .with(
            "web.example.com",
            AAAA,
            [&[0x20, 1, 0x0d, 0xb8][..], &[0; 11], &[0x10]].concat(),
        )
        .with("web.example.com", RRSIG, signature)
        .with("10.113.0.203.in-addr.arpa", PTR, wire_name("web.example.com"))
        .with("example.com", SOA, soa())
        .with("example.com", NS, wire_name("ns1.example.com"))
        .with("example.com", NS, wire_name("ns2.example.com"))
        .with(
            "example.com",
            MX,
            [&[0, 5][..], &wire_name("mail.example.com")].concat(),
        )
        .with("example.com", CAA, [&[0, 5][..], b"issueca.example.net"].concat())
        .with("_sip._tcp.example.com", SRV, service("web.example.com"))
        .with("text.example.com", TXT, text(&[&long, &longer, "end"]))
        .with("web.example.com", HTTPS, binding.clone())
        .with("_dns.example.com", SVCB, binding)
        .with("odd.example.com", UNKNOWN, vec![1, 2, 3, 0, 0xff])
        .with("alias.example.com", CNAME, wire_name("middle.example.net"))
        .with("middle.example.net", CNAME, wire_name("web.example.com"))
        .with("four.example.com", A, vec![203, 0, 113, 4])
        .fails("broken.example.com", SERVFAIL)
        .fails("closed.example.com", REFUSED)
        .fails("other.example.com", NOTAUTH);
    for n in 0..20 {
        authority = authority.with(
            "big.example.com",
            TXT,
            text(&[&format!("{n:02}").repeat(120), "x"]),
        );
    }
    for n in 0..3 {
        authority = authority.with(
            "middling.example.com",
            TXT,
            text(&[&format!("{n:02}").repeat(100)]),
        );
    }
    authority.serve(world.internet(), SERVER)
}

/// What is asked, as `dig` takes it.
const QUESTIONS: &[&str] = &[
    "web.example.com A",
    "web.example.com AAAA",
    "-x 203.0.113.10",
    "example.com SOA",
    "example.com NS",
    "example.com MX",
    "example.com CAA",
    "_sip._tcp.example.com SRV",
    "text.example.com TXT",
    "web.example.com HTTPS",
    "_dns.example.com SVCB",
    "odd.example.com TYPE65400",
    "alias.example.com A",
    "alias.example.com CNAME",
    "alias.example.com AAAA",
    "web.example.com A +dnssec",
    "web.example.com A +dnssec +cdflag",
    "web.example.com A +noadflag",
    "web.example.com RRSIG",
    "web.example.com A +norecurse",
    "web.example.com A +noedns",
    "wEb.eXaMpLe.CoM A",
    "middling.example.com TXT +bufsize=512 +ignore",
    "middling.example.com TXT +bufsize=1232",
    "middling.example.com TXT +tcp",
    "four.example.com AAAA",
    "four.example.com TXT",
    "nobody.example.com A",
    "nobody.example.com TYPE65400",
    "broken.example.com A",
    "closed.example.com AAAA",
    "other.example.com A",
];

#[test]
fn what_dig_sees_through_the_gateway_is_what_the_server_says() {
    staged(
        what_dig_sees_through_the_gateway_is_what_the_server_says,
        |world| {
            let authority = authority(world);
            world.file("questions", &(QUESTIONS.join("\n") + "\n"));
            let script = |server: &str| {
                format!(
                    "while read -r line; do echo \"== $line\"; dig @{server} +tries=1 +time=5 +nocookie $line; done < questions"
                )
            };
            let mut direct = world.program("sh");
            direct.args(["-c", &script("203.0.113.10")]);
            let direct = answers(&Running::start(direct).wait());
            let asked_directly = authority.queries().len();
            let through = answers(&world.script(&[], &script("192.168.127.1")));

            assert_eq!(direct.len(), QUESTIONS.len());
            for (direct, through) in direct.iter().zip(&through) {
                assert_eq!(through, direct);
            }
            // What is compared is not one failure with another.
            let seen = |question: &str, part: &str| {
                let place = QUESTIONS.iter().position(|known| *known == question).unwrap();
                assert!(through[place].contains(part), "{part}: {}", through[place]);
            };
            seen(
                "text.example.com TXT",
                &format!("\"{}\" \"{}\" \"end\"", "a".repeat(255), "b".repeat(255)),
            );
            seen(
                "alias.example.com A",
                "middle.example.net.\t60\tIN\tCNAME\tweb.example.com.",
            );
            seen("web.example.com A +dnssec", "RRSIG\tA 13");
            seen("web.example.com A +dnssec", "flags: qr rd ra ad;");
            seen("web.example.com A +dnssec +cdflag", "flags: qr rd ra ad cd;");
            seen("web.example.com HTTPS", "alpn=\"h2\"");
            seen("odd.example.com TYPE65400", "\\# 5 01020300FF");
            seen("wEb.eXaMpLe.CoM A", "wEb.eXaMpLe.CoM.\t60\tIN\tA");
            seen("middling.example.com TXT +bufsize=512 +ignore", " tc ");
            seen("middling.example.com TXT +bufsize=1232", "ANSWER: 3");
            seen("four.example.com AAAA", "status: NOERROR");
            seen("nobody.example.com A", "status: NXDOMAIN");
            seen("broken.example.com A", "status: SERVFAIL");
            seen("closed.example.com AAAA", "status: REFUSED");
            seen("other.example.com A", "status: NOTAUTH");

            // Upstream: who wants signatures is known, and how a guest writes a name is not.
            let queries = authority.queries().split_off(asked_directly);
            let wants_dnssec = |query: &&Vec<u8>| query[query.len() - 4] & 0x80 != 0;
            assert_eq!(
                queries.iter().filter(wants_dnssec).count(),
                2,
                "+dnssec was asked for twice"
            );
            let name = |query: &Vec<u8>| query[12..].split(|byte| *byte == 0).next().unwrap().to_vec();
            assert!(
                queries
                    .iter()
                    .all(|query| !name(query).iter().any(u8::is_ascii_uppercase))
            );
        },
    );
}

#[test]
fn an_answer_of_five_thousand_bytes_is_cut_over_udp_and_whole_over_tcp() {
    staged(
        an_answer_of_five_thousand_bytes_is_cut_over_udp_and_whole_over_tcp,
        |world| {
            let _authority = authority(world);
            let ended = world.script(
                &[],
                "dig big.example.com TXT +ignore | grep -c -e 'flags: qr tc rd ra' -e 'ANSWER: 0'; \
             dig big.example.com TXT +bufsize=4096 | grep -e 'ANSWER: 20' -e '(TCP)' | wc -l; \
             dig big.example.com TXT +tcp +bufsize=512 | grep -o -e 'ANSWER: 20' -e 'MSG SIZE .*'; \
             dig big.example.com TXT +tcp +noedns | grep -o -e 'ANSWER: 20'",
            );
            let lines: Vec<&str> = ended.stdout.lines().collect();
            assert_eq!(lines[..3], ["1", "2", "ANSWER: 20"], "{ended:?}");
            let size: usize = lines[3].rsplit(' ').next().unwrap().parse().unwrap();
            assert!(size > 5_000, "{ended:?}");
            assert_eq!(lines[4..], ["ANSWER: 20"], "{ended:?}");
        },
    );
}

/// gvproxy answers these types with nothing, without asking.
#[test]
fn fault_aaaa_ptr_and_soa_are_asked_upstream_like_any_type() {
    staged(fault_aaaa_ptr_and_soa_are_asked_upstream_like_any_type, |world| {
        let authority = authority(world);
        let ended = world.script(
            &[],
            "dig +short web.example.com AAAA; dig +short -x 203.0.113.10; dig +short example.com SOA | cut -d' ' -f1,3",
        );
        assert_eq!(
            ended.stdout, "2001:db8::10\nweb.example.com.\nns1.example.com. 7\n",
            "{ended:?}"
        );
        assert_eq!(authority.queries().len(), 3);
    });
}

/// gvproxy makes NXDOMAIN of it, which resolvers remember.
#[test]
fn fault_an_upstreams_servfail_is_not_nxdomain_nor_is_silence() {
    staged(
        fault_an_upstreams_servfail_is_not_nxdomain_nor_is_silence,
        |world| {
            let _authority = authority(world);
            let ended = world.script(&[], "dig +tries=1 broken.example.com | grep -o 'status: [A-Z]*'");
            assert_eq!(ended.stdout, "status: SERVFAIL\n", "{ended:?}");
            // Nobody is at this address.
            let ended = world.script(
                &["--dns", "203.0.113.77"],
                "dig +tries=1 +time=15 web.example.com | grep -o -e 'status: [A-Z]*' -e 'EDE: 23'",
            );
            assert_eq!(ended.stdout, "status: SERVFAIL\nEDE: 23\n", "{ended:?}");
        },
    );
}

/// gvproxy sends them to the host's resolver, and so what the network is called.
#[test]
fn fault_other_types_other_cases_and_the_apex_of_a_local_zone_go_nowhere() {
    staged(
        fault_other_types_other_cases_and_the_apex_of_a_local_zone_go_nowhere,
        |world| {
            let authority = authority(world);
            let flags = [
                "--zone",
                "lab.internal:@=10.0.0.7,six=fd00::6,both=10.0.0.1,both=fd00::1,/^w[0-9]+$/=10.0.0.3",
            ];
            let (_up, socket) = world.up(&flags);
            let script = "for q in 'HOST.Containers.INTERNAL A' 'host.containers.internal AAAA' 'host.containers.internal TXT' \
                'host.docker.internal HTTPS' 'containers.internal A' 'containers.internal SOA' 'nobody.containers.internal MX' \
                'lab.internal A' 'lab.internal MX' 'six.lab.internal AAAA' 'six.lab.internal A' 'both.lab.internal A' \
                'both.lab.internal AAAA' 'W12.lab.internal A' 'x.w12.lab.internal A' '-x 192.168.127.254'; do \
                dig @192.168.127.1 $q | grep -o 'status: [A-Z]*' | cut -d' ' -f2 | tr '\\n' ' '; dig @192.168.127.1 +short $q | cut -d' ' -f1 | tr '\\n' ' '; echo; done";
            let ended = Running::start(guest(world, &socket, script)).wait();
            let expected = [
                "NOERROR 192.168.127.254 ",
                "NOERROR ",
                "NOERROR ",
                "NOERROR ",
                "NOERROR ",
                "NOERROR containers.internal. ",
                "NXDOMAIN ",
                "NOERROR 10.0.0.7 ",
                "NOERROR ",
                "NOERROR fd00::6 ",
                "NOERROR ",
                "NOERROR 10.0.0.1 ",
                "NOERROR fd00::1 ",
                "NOERROR 10.0.0.3 ",
                "NXDOMAIN ",
                "NOERROR host.containers.internal. ",
            ];
            assert_eq!(ended.stdout.lines().collect::<Vec<_>>(), expected, "{ended:?}");
            assert_eq!(
                authority.queries(),
                Vec::<Vec<u8>>::new(),
                "nothing went upstream"
            );
        },
    );
}

#[test]
fn zones_change_while_guests_run_in_gvproxys_order() {
    staged(zones_change_while_guests_run_in_gvproxys_order, |world| {
        let authority = authority(world);
        let (_up, socket) = world.up(&[]);
        eventually("the network is known", || {
            !world.list(&["dns", "zones"]).is_empty()
        });
        let look = |question: &str| dig(world, &socket, &format!("+short {question}"));
        let records = |zone: &str| -> Vec<String> {
            let zones = world.list(&["dns", "zones"]);
            let zone = zones
                .iter()
                .find(|known| known["name"] == zone)
                .cloned()
                .unwrap_or_default();
            let text =
                |record: &serde_json::Value, key: &str| record[key].as_str().unwrap_or_default().to_owned();
            let of = |r: &serde_json::Value| {
                format!("{}{}={}", text(r, "name"), text(r, "regexp"), text(r, "address"))
            };
            zone["records"].as_array().into_iter().flatten().map(of).collect()
        };
        // Added to, in place: the new one before the old one of the same name.
        let zone = "containers.internal";
        world.vnetctl(&[
            "dns",
            "zones",
            "add",
            zone,
            "host=10.0.0.9",
            "/^web-/=10.0.0.8",
            "--default",
            "10.0.0.1",
        ]);
        assert_eq!(
            records(zone),
            [
                "host=10.0.0.9",
                "^web-=10.0.0.8",
                "gateway=192.168.127.1",
                "host=192.168.127.254"
            ]
        );
        for (name, address) in [
            ("host", "10.0.0.9"),
            ("WEB-1", "10.0.0.8"),
            ("gateway", "192.168.127.1"),
            ("x", "10.0.0.1"),
        ] {
            assert_eq!(look(&format!("{name}.{zone}")), format!("{address}\n"));
        }
        assert_eq!(world.list(&["dns", "zones"])[0]["name"], zone, "in its place");
        world.vnetctl(&["dns", "zones", "remove", zone, "host=10.0.0.9", "/^web-/"]);
        assert_eq!(look(&format!("host.{zone}")), "192.168.127.254\n");
        let again = world.try_vnetctl(&["dns", "zones", "remove", zone, "/^web-/"]);
        assert!(
            again.code == 1 && again.stderr.contains("has no such record"),
            "{again:?}"
        );

        // The first zone that a name is in answers, not the longest.
        world.vnetctl(&["dns", "zones", "set", "test", "--default", "10.0.0.1"]);
        world.vnetctl(&["dns", "zones", "set", "a.test", "--default", "10.0.0.2"]);
        assert_eq!(look("x.a.test"), "10.0.0.1\n");
        world.vnetctl(&["dns", "zones", "remove", "test"]);
        assert_eq!(look("x.a.test"), "10.0.0.2\n");

        // The root is every name; a record without an address lets its name through.
        assert_eq!(look("four.example.com"), "203.0.113.4\n");
        world.vnetctl(&["dns", "zones", "set", ".", "web.example.com=upstream"]);
        assert_eq!(look("web.example.com"), "203.0.113.10\n");
        let asked = authority.queries().len();
        assert!(dig(world, &socket, "four.example.com").contains("status: NXDOMAIN"));
        assert_eq!(authority.queries().len(), asked);
        assert_eq!(
            look("x.a.test"),
            "10.0.0.2\n",
            "those before the root answer still"
        );
        world.vnetctl(&["dns", "zones", "remove", "."]);
        assert_eq!(look("four.example.com"), "203.0.113.4\n");

        let wrong = world.try_vnetctl(&["dns", "zones", "set", "b.test", "/(/=10.0.0.1"]);
        assert!(
            wrong.code == 1
                && wrong
                    .stderr
                    .contains("zone.records[0].regexp: cannot be used: unclosed group"),
            "{wrong:?}"
        );
    });
}

#[test]
fn the_hosts_resolvers_are_followed_from_none_to_others_while_guests_ask() {
    staged(
        the_hosts_resolvers_are_followed_from_none_to_others_while_guests_ask,
        |world| {
            own_etc();
            let known = |address| [("web.example.com", Answer::A(address))];
            let _one = Dns::serve(world.internet(), SERVER, &known("192.0.2.1"));
            let two = Dns::serve(world.internet(), "198.51.100.7:53", &known("192.0.2.2"));
            // As systemd-resolved: on the host's loopback, which is closed to guests.
            let _local = Dns::serve(world.host(), "127.0.0.53:53", &known("192.0.2.53"));
            let (_up, socket) = world.up(&[]);
            let look = || dig(world, &socket, "+short web.example.com");
            let follows = |what: &str, answer: &str| eventually(what, || look() == format!("{answer}\n"));

            // Without a network there is no such file, and an answer all the same.
            let began = Instant::now();
            assert!(dig(world, &socket, "web.example.com").contains("status: SERVFAIL"));
            assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
            replace("nameserver 203.0.113.10\n");
            follows("a network that appears", "192.0.2.1");
            replace("nameserver 198.51.100.7\n");
            follows("a file that is replaced", "192.0.2.2");
            fs::write(RESOLV_CONF, "nameserver 203.0.113.10\n").unwrap();
            follows("a file that is written in place", "192.0.2.1");
            fs::remove_file(RESOLV_CONF).unwrap();
            thread::sleep(Duration::from_millis(1_200));
            assert_eq!(look(), "192.0.2.1\n", "a file that is gone changes nothing");
            replace("nameserver 127.0.0.53\noptions edns0 trust-ad\n");
            follows("a server on the host's loopback", "192.0.2.53");

            // A dead server before a good one, and nothing but a dead one until the network is another.
            replace("nameserver 203.0.113.77\nnameserver 198.51.100.7\n");
            follows("the second of two", "192.0.2.2");
            replace("nameserver 203.0.113.77\n");
            thread::sleep(Duration::from_millis(1_200));
            let waiting = Running::start(guest(
                world,
                &socket,
                "dig +short +tries=1 +time=9 @192.168.127.1 web.example.com",
            ));
            thread::sleep(Duration::from_millis(500));
            replace("nameserver 198.51.100.7\n");
            assert_eq!(
                waiting.wait().stdout,
                "192.0.2.2\n",
                "the question goes on with the new one"
            );

            // Under questions: not one is lost to a change.
            let asked = two.asked().len();
            let asking = "for n in $(seq 80); do dig +short +tries=1 +time=4 @192.168.127.1 web.example.com; sleep 0.05; done; touch done";
            let asking = Running::start(guest(world, &socket, asking));
            for n in 0.. {
                if world.work().join("done").exists() {
                    break;
                }
                let text = ["nameserver 203.0.113.10\n", "nameserver 198.51.100.7\n"][n % 2];
                if n % 4 < 2 {
                    replace(text);
                } else {
                    let mut file = fs::File::create(RESOLV_CONF).unwrap();
                    thread::sleep(Duration::from_millis(100));
                    file.write_all(text.as_bytes()).unwrap();
                }
                thread::sleep(Duration::from_millis(400));
            }
            let ended = asking.wait();
            let answers: Vec<&str> = ended.stdout.lines().collect();
            assert_eq!(answers.len(), 80, "{ended:?}");
            for address in ["192.0.2.1", "192.0.2.2"] {
                assert!(answers.contains(&address), "{address}: {answers:?}");
            }
            assert!(
                answers
                    .iter()
                    .all(|answer| ["192.0.2.1", "192.0.2.2"].contains(answer)),
                "{answers:?}"
            );
            assert!(two.asked().len() > asked);
        },
    );
}

#[test]
fn the_hosts_search_domains_reach_guests_and_the_next_lease_has_the_new_ones() {
    staged(
        the_hosts_search_domains_reach_guests_and_the_next_lease_has_the_new_ones,
        |world| {
            own_etc();
            replace("search corp.example lab.test\nnameserver 203.0.113.10\n");
            let (_up, socket) = world.up(&["--dns-search", "host"]);
            let script = world.file(
            "script",
            "#!/bin/sh\necho \"$reason search=$new_domain_search domain=$new_domain_name\" >> events\nexit 0\n",
        );
            world.open_to_all(&script);
            world.file("solicit.py", SOLICIT);
            let client = "dhclient -1 -sf ./script -pf pid -lf leases";
            let mut command = world.load();
            command.args(["guest", "--no-address", "--socket", &socket, "--", "sh", "-c"]);
            command.arg(format!(
                "touch leases; {client} tap0 && python3 solicit.py; dhclient -x -pf pid; touch first; \
             until [ -e go ]; do sleep 0.05; done; {client} tap0; python3 solicit.py"
            ));
            let running = Running::start(command);
            eventually("the first lease", || world.work().join("first").exists());
            replace("domain home.test\nnameserver 203.0.113.10\n");
            thread::sleep(Duration::from_millis(1_200));
            world.file("go", "");
            let ended = running.wait();

            let events = fs::read_to_string(world.work().join("events")).unwrap();
            let told: Vec<&str> = events
                .lines()
                .filter(|line| line.contains("search=") && !line.contains("PREINIT"))
                .collect();
            assert!(
                told[0].starts_with("BOUND search=corp.example. lab.test. domain=corp.example"),
                "{events}"
            );
            assert!(
                told.last()
                    .unwrap()
                    .ends_with("search=home.test. domain=home.test"),
                "{events}"
            );
            assert_eq!(ended.stdout, "corp.example lab.test\nhome.test\n", "{ended:?}");
        },
    );
}

/// Asks for a router's advertisement and prints the search domains in it (RFC 8106).
const SOLICIT: &str = r"
import socket, time
s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
s.settimeout(1)
for attempt in range(20):
    try:
        s.sendto(b'\x85\0\0\0\0\0\0\0', ('ff02::2', 0, 0, socket.if_nametoindex('tap0')))
        data = s.recv(2000)
        while data[0] != 134:
            data = s.recv(2000)
        break
    except OSError:
        time.sleep(0.2)
at = 16
while at < len(data):
    if data[at] == 31:
        names, rest = [], data[at + 8:at + 8 * data[at + 1]]
        while rest and rest[0]:
            labels = []
            while rest[0]:
                labels.append(rest[1:1 + rest[0]].decode())
                rest = rest[1 + rest[0]:]
            names.append('.'.join(labels))
            rest = rest[1:]
        print(' '.join(names), flush=True)
    at += 8 * data[at + 1]
";

/// What `dig` says in a guest.
fn dig(world: &World, socket: &str, arguments: &str) -> String {
    let script = format!("dig +tries=1 +time=9 @192.168.127.1 {arguments}");
    Running::start(guest(world, socket, &script)).wait().stdout
}

fn guest(world: &World, socket: &str, script: &str) -> Command {
    let mut guest = world.load();
    guest.args(["guest", "--socket", socket, "--", "sh", "-c", script]);
    guest
}

/// Answers, one for each question, without what differs from one time to the next.
fn answers(ended: &Ended) -> Vec<String> {
    let volatile = [
        "; <<>>",
        ";; global options",
        "; (1 server",
        ";; Query time",
        ";; SERVER",
        ";; WHEN",
    ];
    let plain = |line: &&str| !line.is_empty() && !volatile.iter().any(|start| line.starts_with(start));
    let without_id = |line: &str| match line.split_once(", id: ") {
        Some((before, _)) => before.to_owned(),
        None => line.to_owned(),
    };
    let lines = |answer: &str| -> String {
        let lines = answer.lines().filter(plain).map(without_id);
        lines.map(|line| line + "\n").collect()
    };
    ended.stdout.split("== ").skip(1).map(lines).collect()
}

/// Gives this stage an `/etc` in which files can be replaced, and no resolv.conf in it.
fn own_etc() {
    let none: Option<&Path> = None;
    mount(Some("tmpfs"), "/mnt", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    // What is not this user's need not be there.
    let _ = Command::new("cp").args(["-r", "/etc/.", "/mnt"]).output();
    fs::remove_file("/mnt/resolv.conf").unwrap();
    mount(Some("/mnt"), "/etc", none, MsFlags::MS_BIND, none).unwrap();
}

/// Puts another file in the place of the host's at once.
fn replace(text: &str) {
    fs::write("/etc/resolv.conf.next", text).unwrap();
    fs::rename("/etc/resolv.conf.next", RESOLV_CONF).unwrap();
}

const RESOLV_CONF: &str = "/etc/resolv.conf";

const A: u16 = 1;
const NS: u16 = 2;
const CNAME: u16 = 5;
const SOA: u16 = 6;
const PTR: u16 = 12;
const MX: u16 = 15;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const SRV: u16 = 33;
const RRSIG: u16 = 46;
const SVCB: u16 = 64;
const HTTPS: u16 = 65;
const CAA: u16 = 257;
const UNKNOWN: u16 = 65_400;
const SERVFAIL: u8 = 2;
const REFUSED: u8 = 5;
const NOTAUTH: u8 = 9;
