//! IPv6 end to end: asked for, allowed and refused like IPv4, and no way round a rule for IPv4; and a real
//! Linux stack that finds its way by what the gateway advertises.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use vnet_tests::{
    Answer, Dns, Ended, Running, World, binaries, eventually, http, staged, staged_with, udp_echo,
};
use vnetctl::sandbox::stage::StageSpec;

const SERVER6: &str = "2001:db8:1::10";
/// What a NAT64 translator would be reached at for 203.0.113.10.
const NAT64: &str = "64:ff9b::cb00:710a";
/// curl: it could not connect.
const REFUSED: i32 = 7;
/// A request that is refused at once takes no longer, on a loaded machine.
const AT_ONCE: Duration = Duration::from_secs(4);

/// The usual stage with IPv6 on the wire, and no default route for it on the host.
fn dual() -> StageSpec {
    let nets = |texts: &[&str]| texts.iter().map(|net| net.parse().unwrap()).collect();
    StageSpec {
        host: nets(&["203.0.113.1/24", "2001:db8:1::1/64"]),
        internet: nets(&[
            "203.0.113.10/24",
            "198.51.100.7/32",
            "2001:db8:1::10/64",
            "64:ff9b::cb00:710a/128",
        ]),
        resolv_conf: Some("nameserver 203.0.113.10\n".to_owned()),
        ..StageSpec::default()
    }
}

fn dns(world: &World) -> Dns {
    Dns::serve(
        world.internet(),
        "203.0.113.10:53",
        &[
            ("both.example.com", Answer::A("203.0.113.10")),
            ("both.example.com", Answer::Aaaa(SERVER6)),
            ("six.example.com", Answer::Aaaa(SERVER6)),
        ],
    )
}

fn curl(world: &World, flags: &[&str], url: &str) -> Running {
    world.run(flags, &["curl", "-g", "-sS", url])
}

#[test]
fn a_held_connection_over_ipv6_completes_after_a_yes_and_is_refused_after_a_no() {
    staged_with(
        a_held_connection_over_ipv6_completes_after_a_yes_and_is_refused_after_a_no,
        &dual(),
        |world| {
            let server = http(world.internet(), "[2001:db8:1::10]:80");
            let url = format!("http://[{SERVER6}]/story");
            let mut run = curl(world, &["--secure-mode", "--vm", "web"], &url);
            let id = world.first_pending_id();
            let asked = run.complains(&id);
            assert!(asked.contains("asks for tcp [2001:db8:1::10]:80"), "{asked}");
            assert_eq!(server.connections(), 0, "nothing goes out before the yes");
            world.vnetctl(&["approve", &id]);
            let ended = run.wait();
            assert_eq!(
                (ended.code, ended.stdout.as_str()),
                (0, "this is [2001:db8:1::10]:80 at /story\n"),
                "{ended:?}"
            );

            let run = curl(world, &["--secure-mode"], &url);
            world.vnetctl(&["deny", &world.first_pending_id()]);
            let denied = Instant::now();
            assert_eq!(run.wait().code, REFUSED);
            assert!(denied.elapsed() < AT_ONCE, "{:?}", denied.elapsed());
            assert_eq!(server.connections(), 1);
            world.is_clean();
        },
    );
}

#[test]
fn rules_hold_for_connections_datagrams_and_echo_over_ipv6() {
    staged_with(
        rules_hold_for_connections_datagrams_and_echo_over_ipv6,
        &dual(),
        |world| {
            let _http = http(world.internet(), "[2001:db8:1::10]:80");
            let udp = udp_echo(world.internet(), "[2001:db8:1::10]:9000");
            let script = "curl -g -sS http://[2001:db8:1::10]/x; echo curl $?
                python3 -c \"
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.connect(('2001:db8:1::10', 9000)); s.settimeout(10)
try:
    s.send(b'x' * 3000); print('udp', len(s.recv(5000)))
except OSError as e:
    print('udp', type(e).__name__)
\"
                ping -6 -q -c 1 -W 10 2001:db8:1::10 > /dev/null; echo ping $?";
            let ended = world.script(
                &[
                    "--allow",
                    "tcp 2001:db8:1::/64",
                    "--allow",
                    "udp 2001:db8:1::/64",
                    "--allow",
                    "icmpv6 ::/0",
                ],
                script,
            );
            let all = "this is [2001:db8:1::10]:80 at /x\ncurl 0\nudp 3000\nping 0\n";
            assert_eq!(ended.stdout, all, "{ended:?}");
            let began = Instant::now();
            let ended = world.script(&["--deny", "any 2001:db8::/32", "--allow", "any ::/0"], script);
            assert_eq!(ended.stdout, "curl 7\nudp PermissionError\nping 1\n", "{ended:?}");
            assert!(began.elapsed() < AT_ONCE * 2, "{:?}", began.elapsed());
            assert_eq!(udp.requests(), 1);
        },
    );
}

#[test]
fn a_name_is_one_question_whether_its_addresses_are_ipv6_or_both() {
    staged_with(
        a_name_is_one_question_whether_its_addresses_are_ipv6_or_both,
        &dual(),
        |world| {
            let dns = dns(world);
            let six = http(world.internet(), "[2001:db8:1::10]:80");
            let four = http(world.internet(), "203.0.113.10:80");
            for (name, by_ipv6) in [("six.example.com", true), ("both.example.com", false)] {
                let run = curl(
                    world,
                    &["--secure-mode", "--vm", name],
                    &format!("http://{name}/"),
                );
                let id = world.first_pending_id();
                world.vnetctl(&["approve", &id]);
                let ended = run.wait();
                assert_eq!(ended.code, 0, "{ended:?}");
                assert_eq!(ended.stderr.matches("asks for").count(), 1, "{ended:?}");
                assert!(ended.stdout.contains(SERVER6) || !by_ipv6, "{ended:?}");
            }
            // Addresses of the guest's own prefix make it prefer IPv4 where there is both (RFC 6724 §2.1).
            assert_eq!((six.connections(), four.connections()), (1, 1));
            let run = world.run(
                &["--allow", "domain both.example.com"],
                &["curl", "-6", "-sS", "http://both.example.com/"],
            );
            let ended = run.wait();
            assert!(ended.stdout.contains(SERVER6), "{ended:?}");
            assert!(dns.asked().iter().any(|q| q == "udp AAAA six.example.com"));
        },
    );
}

#[test]
fn no_ipv6_spelling_goes_round_a_rule_for_ipv4() {
    staged_with(no_ipv6_spelling_goes_round_a_rule_for_ipv4, &dual(), |world| {
        let four = http(world.internet(), "203.0.113.10:80");
        let nat64 = http(world.internet(), "[64:ff9b::cb00:710a]:80");
        let spellings = [
            format!("http://[{NAT64}]/"),
            "http://[::ffff:203.0.113.10]/".to_owned(),
        ];
        // Every IPv6 address is allowed, that IPv4 address is not.
        for url in &spellings {
            for flags in [
                &["--allow", "any ::/0"][..],
                &[
                    "--allow",
                    "any ::/0",
                    "--deny",
                    "any 203.0.113.0/24",
                    "--allow",
                    "any 0.0.0.0/0",
                ],
            ] {
                assert_eq!(curl(world, flags, url).wait().code, REFUSED, "{url} {flags:?}");
            }
        }
        assert_eq!((four.connections(), nat64.connections()), (0, 0));
        // What is asked is asked for the IPv4 address, and that rule lets it through.
        let run = curl(world, &["--secure-mode"], &spellings[0]);
        let request = world.first_pending();
        let prefix = request["target"]["address"]["prefix"]
            .as_str()
            .unwrap_or_default();
        assert!(prefix.starts_with("203.0.113.10"), "{request}");
        world.vnetctl(&["approve", &vnet_tests::id(&request)]);
        assert_eq!(run.wait().code, 0);
        let ended = curl(world, &["--allow", "tcp 203.0.113.10:80"], &spellings[0]).wait();
        assert_eq!(
            ended.stdout, "this is [64:ff9b::cb00:710a]:80 at /\n",
            "{ended:?}"
        );
        assert_eq!(nat64.connections(), 2);

        // Other spellings lead nowhere, whatever is allowed.
        for address in [
            "::203.0.113.10",
            "2002:cb00:710a::1",
            "64:ff9b:1::cb00:710a",
            "::1",
        ] {
            let url = format!("http://[{address}]/");
            let began = Instant::now();
            let run = world.run(&[], &["curl", "-g", "-sS", "-m", "2", &url]);
            assert_ne!(run.wait().code, 0, "{url}");
            assert!(began.elapsed() < AT_ONCE * 2);
        }
        assert_eq!((four.connections(), nat64.connections()), (0, 2));
    });
}

#[test]
fn a_host_without_ipv6_refuses_it_at_once_and_nobody_is_asked() {
    staged(
        a_host_without_ipv6_refuses_it_at_once_and_nobody_is_asked,
        |world| {
            let began = Instant::now();
            let ended = curl(world, &["--secure-mode"], "http://[2001:db8:1::10]/").wait();
            assert_eq!(ended.code, REFUSED, "{ended:?}");
            assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
            assert!(!ended.stderr.contains("asks for"), "{ended:?}");
            assert!(world.pending().is_empty());

            // Where the network is told not to carry it, the command has none.
            let ended = world.script(&["--ipv6-prefix", "off"], "ip -6 addr show dev eth0; ip -6 route");
            assert_eq!((ended.code, ended.stdout.as_str()), (0, ""), "{ended:?}");
        },
    );
}

#[test]
fn a_command_has_an_address_at_once_and_the_gateway_answers_there() {
    staged_with(
        a_command_has_an_address_at_once_and_the_gateway_answers_there,
        &dual(),
        |world| {
            let _dns = dns(world);
            let ended = world.script(
                &[
                    "--allow",
                    "domain six.example.com",
                    "--ipv6-prefix",
                    "fd12:3456::/64",
                ],
                "ip -6 -o addr show dev eth0 scope global tentative
                 ip -6 -o addr show dev eth0 scope global | grep -o 'fd12[^ ]*'
                 ip -6 route show default | cut -d' ' -f1-5
                 ping -6 -q -c 1 -W 5 fd12:3456::1 > /dev/null; echo $?
                 ping -6 -q -c 1 -W 5 fe80::1%eth0 > /dev/null; echo $?
                 dig +short +tries=1 @fd12:3456::1 six.example.com AAAA
                 dig +short +tries=1 +tcp @fd12:3456::1 six.example.com AAAA",
            );
            let expected =
                "fd12:3456::2/64\ndefault via fd12:3456::1 dev eth0\n0\n0\n2001:db8:1::10\n2001:db8:1::10\n";
            assert_eq!(ended.stdout, expected, "{ended:?}");
        },
    );
}

#[test]
fn a_port_of_the_hosts_ipv6_leads_into_a_guest_over_either_family() {
    staged_with(
        a_port_of_the_hosts_ipv6_leads_into_a_guest_over_either_family,
        &dual(),
        |world| {
            // The guest's first packet over IPv6 shows its address.
            let serve = "import http.server, socket, threading
class Six(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Say(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(self.client_address[0].encode() + b'\\n')
    def log_message(self, *_): pass
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.sendto(b'', ('fd00::1', 9))
four = http.server.ThreadingHTTPServer(('0.0.0.0', 80), Say)
six = Six(('fd00::2', 81), Say)
threading.Thread(target=four.serve_forever).start()
print('serving', flush=True)
six.serve_forever()";
            let mut run = world.run(
                &["-p", "[::1]:8080:80", "-p", "[::1]:8081:[fd00::2]:81"],
                &["python3", "-c", serve],
            );
            run.prints("serving");
            for (port, from) in [(8080, "192.168.127.1\n"), (8081, "fd00::1\n")] {
                let mut said = String::new();
                eventually("the forward answers", || {
                    let mut command = world.program("curl");
                    command.args(["-g", "-s", "-m", "5", &format!("http://[::1]:{port}/")]);
                    said = Running::start(command).wait().stdout;
                    !said.is_empty()
                });
                assert_eq!(said, from);
            }
            run.signal(nix::sys::signal::Signal::SIGTERM);
        },
    );
}

#[test]
fn a_linux_guest_finds_its_way_by_what_the_gateway_advertises() {
    staged_with(
        a_linux_guest_finds_its_way_by_what_the_gateway_advertises,
        &dual(),
        |world| {
            let _http = http(world.internet(), "[2001:db8:1::10]:80");
            let socket = world.runtime_dir().join("vm.sock");
            let url = format!("unix://{}", socket.display());
            let mut up = Running::start(world.command(&[
                "up",
                "--vm",
                "web",
                "--listen-qemu",
                &url,
                "--allow",
                "tcp [2001:db8:1::10]:80",
            ]));
            up.complains("serving VM web");
            let ended = guest(
                world,
                &socket,
                &["--no-address"],
                // The system's settings stay as they are: this is any Linux guest.
                "until ip -6 -o addr show dev tap0 scope global -tentative | grep -q fd00; do sleep 0.05; done
                 ip -6 -o addr show dev tap0 scope global -tentative | grep -o 'fd00::[^ ]*' > slaac
                 ping -6 -q -c 1 -W 5 fd00::1 > /dev/null && ping -6 -q -c 1 -W 5 fe80::1%tap0 > /dev/null && touch pinged
                 ip -6 route show default > before
                 until [ -e routed ]; do sleep 0.05; done
                 until ip -6 route show default | grep -q 'via fe80::1 dev tap0 proto ra'; do sleep 0.05; done
                 curl -g -sS -m 20 http://[2001:db8:1::10]/ > fetched
                 until [ -e end ]; do sleep 0.05; done",
                |world| {
                    eventually("the gateway answers", || world.work().join("pinged").exists());
                    let slaac = fs::read_to_string(world.work().join("slaac")).unwrap();
                    assert_eq!(slaac, "fd00::5054:ff:fe00:2/64\n", "made of its MAC address");
                    eventually("it is listed", || {
                        addresses(world).iter().any(|a| a == "fd00::5054:ff:fe00:2")
                    });
                    assert!(addresses(world).iter().any(|a| a.starts_with("fe80::")));
                    eventually("the guest has looked", || world.work().join("before").exists());
                    let before = fs::read_to_string(world.work().join("before")).unwrap();
                    assert_eq!(before, "", "the host has no default route, so the gateway is none");
                    // The host gets one; the gateway says so at once.
                    let route = "-6 route add default via 2001:db8:1::10";
                    vnet_tests::servers::inside(world.host(), move || {
                        let status = Command::new("ip").args(route.split(' ')).status().unwrap();
                        assert!(status.success());
                    });
                    fs::write(world.work().join("routed"), "").unwrap();
                    eventually("the guest has fetched", || {
                        fs::read(world.work().join("fetched")).is_ok_and(|f| !f.is_empty())
                    });
                    // Another guest cannot take its address.
                    let second = guest(
                        world,
                        &socket,
                        &["--address", "192.168.127.9/24"],
                        "ip -6 addr add fd00::5054:ff:fe00:2/64 dev tap0
                         until ip -6 -o addr show dev tap0 | grep -q dadfailed; do sleep 0.05; done",
                        |_| {},
                    );
                    assert_eq!(second.code, 0, "{second:?}");
                    fs::write(world.work().join("end"), "").unwrap();
                },
            );
            assert_eq!(ended.code, 0, "{ended:?}");
            let fetched = fs::read_to_string(world.work().join("fetched")).unwrap();
            assert_eq!(fetched, "this is [2001:db8:1::10]:80 at /\n");
        },
    );
}

/// Runs a script in a guest with these flags; `meanwhile`, something else.
fn guest(
    world: &World,
    socket: &Path,
    flags: &[&str],
    script: &str,
    meanwhile: impl FnOnce(&World),
) -> Ended {
    let mut command = world.program(binaries::binary("vnet-load"));
    command
        .args(["guest", "--socket"])
        .arg(socket)
        .args(flags)
        .args(["--", "sh", "-c", script]);
    let running = Running::start(command);
    meanwhile(world);
    running.wait_for(Duration::from_secs(60))
}

fn addresses(world: &World) -> Vec<String> {
    let vms = world.list(&["vm", "list"]);
    let of = |vm: &serde_json::Value| vm["addresses"].as_array().cloned().unwrap_or_default();
    vms.iter()
        .flat_map(of)
        .filter_map(|address| address.as_str().map(str::to_owned))
        .collect()
}
