//! What gvproxy's `stack:` says of the host, as guests meet it: destinations that are dialled at others, addresses
//! that the gateway answers for, metadata services, default zones, the first guest's address.

use nix::sys::signal::Signal;
use vnet_tests::{Dns, Ended, Running, World, eventually, http, staged, staged_with, udp_echo};
use vnetctl::sandbox::stage::StageSpec;

/// Serves guests with these flags, and runs a script in one at 192.168.127.2.
fn guest_of(world: &World, flags: &[&str], script: &str) -> Ended {
    guest_at(world, flags, &["--address", "192.168.127.2/24"], script)
}

fn guest_at(world: &World, flags: &[&str], address: &[&str], script: &str) -> Ended {
    let (up, socket) = world.up(flags);
    let mut guest = world.load();
    guest.arg("guest").args(address).args(["--socket", &socket]);
    guest.args(["--", "sh", "-c", script]);
    let ended = Running::start(guest).wait();
    up.signal(Signal::SIGTERM);
    assert_eq!(up.wait().code, 0);
    ended
}

/// The body of a page, or how curl failed.
const FETCH: &str = "fetch() { curl -sS --max-time 5 --retry 3 --retry-connrefused http://$1/ 2>/dev/null || echo failed; }; ";

#[test]
fn a_destination_is_dialled_at_another_over_every_protocol() {
    staged(a_destination_is_dialled_at_another_over_every_protocol, |world| {
        let far = http(world.internet(), "203.0.113.10:80");
        let datagrams = udp_echo(world.internet(), "203.0.113.10:7");
        let looped = http(world.host(), "127.0.0.1:8088");
        let nat = [
            "--nat",
            "192.0.2.77=203.0.113.10",
            "--nat",
            "192.168.127.253=127.0.0.1",
        ];
        let script = format!(
            "{FETCH}fetch 192.0.2.77; fetch 192.168.127.253:8088; echo hi | socat -t3 - UDP4:192.0.2.77:7; \
             ping -c 1 -W 5 192.0.2.77 >/dev/null && echo pong"
        );
        let ended = guest_of(world, &nat, &script);
        assert_eq!(
            ended.stdout, "this is 203.0.113.10:80 at /\nthis is 127.0.0.1:8088 at /\nhi\npong\n",
            "{ended:?}"
        );
        assert_eq!(
            (far.requests(), datagrams.requests(), looped.requests()),
            (1, 1, 1)
        );
    });
}

#[test]
fn under_a_policy_what_is_dialled_is_judged() {
    staged(under_a_policy_what_is_dialled_is_judged, |world| {
        let far = http(world.internet(), "203.0.113.10:80");
        let looped = http(world.host(), "127.0.0.1:8088");
        let script = "for u in 192.0.2.77 192.168.127.253:8088; do \
             curl -sS -o /dev/null --max-time 5 http://$u/ 2>/dev/null; echo $?; done";
        let met = |rules: &[&str]| {
            let nat = [
                "--nat",
                "192.0.2.77=203.0.113.10",
                "--nat",
                "192.168.127.253=127.0.0.1",
            ];
            let ended = guest_of(world, &[&nat[..], rules].concat(), script);
            assert_eq!(ended.code, 0, "{ended:?}");
            ended.stdout
        };
        assert_eq!(
            met(&["--allow", "any 0.0.0.0/0"]),
            "0\n7\n",
            "loopback needs to be named"
        );
        assert_eq!(
            met(&["--allow", "any 192.0.2.0/24"]),
            "7\n7\n",
            "nor does its neighbourhood do"
        );
        assert_eq!(met(&["--allow", "tcp 127.0.0.1:8088"]), "7\n0\n", "as what it is");
        assert_eq!(
            met(&["--allow", "tcp 192.168.127.253:8088"]),
            "7\n0\n",
            "as what it is called"
        );
        let denied = ["--deny", "any 203.0.113.0/24", "--allow", "any 0.0.0.0/0"];
        assert_eq!(met(&denied), "7\n7\n", "a deny of where it leads holds");
        assert_eq!((far.requests(), looped.requests()), (1, 2));
    });
}

const METADATA: &str = "169.254.169.254";

/// A stage on whose other side a metadata service may be.
fn with_metadata() -> StageSpec {
    let mut spec = StageSpec {
        resolv_conf: Some("nameserver 203.0.113.10\n".to_owned()),
        ..StageSpec::default()
    };
    let address = format!("{METADATA}/32").parse().expect("it is a prefix");
    spec.internet.push(address);
    spec
}

#[test]
fn metadata_is_reached_with_the_flag_alone_and_nobody_is_asked_about_it() {
    staged_with(
        metadata_is_reached_with_the_flag_alone_and_nobody_is_asked_about_it,
        &with_metadata(),
        |world| {
            let server = http(world.internet(), &format!("{METADATA}:80"));
            let fetch = format!("curl -sS --max-time 5 http://{METADATA}/latest 2>/dev/null; echo $?");
            let page = format!("this is {METADATA}:80 at /latest\n0\n");
            let met = |flags: &[&str]| {
                let ended = world.script(flags, &fetch);
                assert_eq!(ended.code, 0, "{ended:?}");
                ended.stdout
            };
            const FLAG: &str = "--ec2-metadata-access";
            assert_eq!(met(&[]), "7\n");
            assert_eq!(met(&["--allow", "any 0.0.0.0/0"]), "7\n");
            assert_eq!(server.connections(), 0);
            assert_eq!(met(&[FLAG]), page);
            assert_eq!(met(&[FLAG, "--secure-mode"]), page);
            assert_eq!(met(&[FLAG, "--allow", "tcp 192.0.2.1:80"]), page);
            assert_eq!(server.connections(), 3);
            assert_eq!(met(&[FLAG, "--deny", "tcp 169.254.169.254:80"]), "7\n");
            assert_eq!(met(&[FLAG, "--mode", "block"]), "7\n");
            assert_eq!(server.connections(), 3);
            assert!(world.pending().is_empty(), "nobody was asked");
        },
    );
}

#[test]
fn guests_of_up_have_metadata_with_the_flag_and_explanation_says_so() {
    staged_with(
        guests_of_up_have_metadata_with_the_flag_and_explanation_says_so,
        &with_metadata(),
        |world| {
            let _server = http(world.internet(), &format!("{METADATA}:80"));
            let (up, socket) = world.up(&["--ec2-metadata-access", "--secure-mode"]);
            let mut guest = world.load();
            guest.args(["guest", "--socket", &socket, "--", "sh", "-c"]);
            guest.arg(format!(
                "curl -sS --max-time 5 http://{METADATA}/; until [ -e end ]; do sleep 0.05; done"
            ));
            let mut guest = Running::start(guest);
            guest.prints("this is 169.254.169.254:80 at /");
            let explain = ["policy", "explain", "--vm", "web", "tcp"];
            let explained = |target: &str| world.json(&[&explain[..], &[target]].concat());
            let found = explained("169.254.169.254:80");
            assert_eq!(
                (&found["action"], &found["reason"]["text"]),
                (&"ACTION_ALLOW".into(), &"--ec2-metadata-access allows it".into()),
                "{found}"
            );
            let beyond = explained("[fd00:ec2::254]:80");
            assert_ne!(beyond["action"], "ACTION_ALLOW", "{beyond}");
            world.file("end", "");
            assert_eq!(guest.wait().code, 0);
            up.signal(Signal::SIGTERM);
            assert_eq!(up.wait().code, 0);
        },
    );
}

#[test]
fn the_gateway_answers_arp_for_virtual_addresses_and_for_nobody_elses() {
    staged(
        the_gateway_answers_arp_for_virtual_addresses_and_for_nobody_elses,
        |world| {
            let flags = ["--virtual-ip", "192.168.127.250", "--virtual-ip", "10.9.9.9"];
            let script = "ip route add 10.9.9.0/24 dev tap0; \
                 for a in 192.168.127.250 192.168.127.251 192.168.127.254 10.9.9.9 10.9.9.10; do \
                 ping -c 1 -W 1 $a >/dev/null; set -- $(ip neigh show $a); echo $1 ${5:-$4}; done";
            let ended = guest_of(world, &flags, script);
            let gateway = "5a:94:ef:e4:0c:dd";
            let found: Vec<(&str, bool)> = ended
                .stdout
                .lines()
                .filter_map(|line| line.split_once(' '))
                .map(|(address, known)| (address, known == gateway))
                .collect();
            assert_eq!(
                found,
                [
                    ("192.168.127.250", true),
                    ("192.168.127.251", false),
                    ("192.168.127.254", true),
                    ("10.9.9.9", true),
                    ("10.9.9.10", false)
                ],
                "{ended:?}"
            );
            // A guest that takes one for itself is not heard.
            let ended = guest_at(
                world,
                &flags,
                &["--address", "192.168.127.250/24"],
                "ping -c 1 -W 1 192.168.127.1 >/dev/null; echo $?",
            );
            assert_eq!(ended.stdout, "1\n", "{ended:?}");
        },
    );
}

#[test]
fn without_default_zones_their_names_are_looked_up_like_any() {
    staged(
        without_default_zones_their_names_are_looked_up_like_any,
        |world| {
            let upstream = Dns::serve(world.internet(), "203.0.113.10:53", &[]);
            let script = "for n in host.containers.internal host.docker.internal db.own.internal; do \
             dig +tries=3 +time=5 +noall +answer +comments @192.168.127.1 $n A \
             | awk '/status/ {print $6} $4 == \"A\" {print $5}'; done";
            let own = ["--zone", "own.internal:db=192.168.127.9"];
            let ended = guest_of(world, &own, script);
            assert_eq!(
                ended.stdout,
                "NOERROR,\n192.168.127.254\nNOERROR,\n192.168.127.254\nNOERROR,\n192.168.127.9\n",
                "{ended:?}"
            );
            assert!(upstream.asked().is_empty(), "{:?}", upstream.asked());
            let ended = guest_of(world, &[&own[..], &["--no-default-zones"]].concat(), script);
            assert_eq!(
                ended.stdout, "NXDOMAIN,\nNXDOMAIN,\nNOERROR,\n192.168.127.9\n",
                "{ended:?}"
            );
            for name in ["host.containers.internal", "host.docker.internal"] {
                assert_eq!(upstream.asked_for(name), 1, "{:?}", upstream.asked());
            }
        },
    );
}

#[test]
fn the_first_guest_is_given_its_address_and_forwards_lead_there() {
    staged(
        the_first_guest_is_given_its_address_and_forwards_lead_there,
        |world| {
            let script = world.file(
                "script",
                "#!/bin/sh\ncase $reason in BOUND) echo \"$new_ip_address\" > address; \
                 ip addr add \"$new_ip_address/24\" dev tap0;; esac\nexit 0\n",
            );
            world.open_to_all(&script);
            let (up, socket) = world.up(&["--first-guest", "192.168.127.10", "-p", "8080:80"]);
            let mut guest = world.load();
            guest.args(["guest", "--no-address", "--socket", &socket, "--", "sh", "-c"]);
            guest.arg(
                "touch leases; dhclient -1 -sf ./script -pf pid -lf leases tap0 && cat address && \
                 { socat TCP-LISTEN:80,reuseaddr,fork SYSTEM:'echo served' & \
                 until [ -e end ]; do sleep 0.05; done; kill $!; }",
            );
            let mut guest = Running::start(guest);
            assert_eq!(guest.prints("\n"), "192.168.127.10\n");
            eventually("the forward leads to the first guest", || {
                let mut fetch = world.program("socat");
                fetch.args(["-u", "TCP:127.0.0.1:8080", "-"]);
                Running::start(fetch).wait().stdout == "served\n"
            });
            world.file("end", "");
            guest.wait();
            up.signal(Signal::SIGTERM);
            assert_eq!(up.wait().code, 0);
        },
    );
}
