//! A guest that finds its way by DHCP with a client of its own choosing: ISC's, which remembers leases and
//! tells when it gives one back. (The QEMU tests have busybox's client, and its renewal.)

use std::fs;
use std::path::Path;

use vnet_tests::{Ended, Running, World, binaries, eventually, staged};

/// What the client calls with each change: notes it, and configures the link.
const SCRIPT: &str = r#"#!/bin/sh
echo "$reason address=$new_ip_address mask=$new_subnet_mask router=$new_routers dns=$new_domain_name_servers mtu=$new_interface_mtu lease=$new_dhcp_lease_time" >> events
case $reason in
BOUND|REBOOT|RENEW) ip addr add "$new_ip_address/24" dev "$interface" 2>/dev/null; ip route replace default via "$new_routers";;
RELEASE|EXPIRE|FAIL) ip addr flush dev "$interface";;
esac
exit 0
"#;

/// A lease of another network that has long to go, as of a laptop that moved.
const ELSEWHERE: &str = r#"lease {
  interface "tap0";
  fixed-address 10.77.0.9;
  option subnet-mask 255.255.255.0;
  option routers 10.77.0.1;
  option dhcp-lease-time 4294967295;
  option dhcp-message-type 5;
  option dhcp-server-identifier 10.77.0.1;
  renew never;
  rebind never;
  expire never;
}
"#;

#[test]
fn a_lease_is_taken_given_back_and_refused_where_it_is_not_from() {
    staged(
        a_lease_is_taken_given_back_and_refused_where_it_is_not_from,
        |world| {
            let socket = world.runtime_dir().join("vm.sock");
            let url = format!("unix://{}", socket.display());
            let mut up = Running::start(world.command(&["up", "--vm", "web", "--listen-qemu", &url]));
            up.complains("serving VM web");
            let script = world.file("script", SCRIPT);
            world.open_to_all(&script);

            // It takes a lease, uses it, and gives it back.
            let ended = guest(
                world,
                &socket,
                "touch leases && $client -lf leases tap0 && ping -c 1 -W 5 192.168.127.1 && touch used && \
                 until [ -e go ]; do sleep 0.05; done; $client -lf leases -r tap0; touch released; \
                 until [ -e end ]; do sleep 0.05; done",
                |world| {
                    eventually("the lease is used", || world.work().join("used").exists());
                    eventually("it is listed", || addresses(world) == ["192.168.127.2"]);
                    fs::write(world.work().join("go"), "").unwrap();
                    eventually("it is given back", || world.work().join("released").exists());
                    eventually("the network knows", || addresses(world).is_empty());
                    fs::write(world.work().join("end"), "").unwrap();
                },
            );
            assert_eq!(ended.code, 0, "{ended:?}");
            let events = fs::read_to_string(world.work().join("events")).unwrap();
            let bound = events
                .lines()
                .find(|l| l.starts_with("BOUND "))
                .unwrap_or_else(|| panic!("{events}"));
            assert_eq!(
                bound,
                "BOUND address=192.168.127.2 mask=255.255.255.0 router=192.168.127.1 dns=192.168.127.1 mtu=1500 \
                 lease=3600"
            );
            assert!(events.lines().any(|l| l.starts_with("RELEASE ")), "{events}");

            // It comes back with a lease of another network: refused at once, so that it asks anew.
            world.file("elsewhere", ELSEWHERE);
            let ended = guest(
                world,
                &socket,
                "$client -v -lf elsewhere tap0 && ping -c 1 -W 5 192.168.127.1",
                |_| {},
            );
            assert_eq!(ended.code, 0, "{ended:?}");
            let said = ended.stderr;
            let at = |what: &str| said.find(what).unwrap_or_else(|| panic!("no {what}: {said}"));
            assert!(
                at("DHCPREQUEST for 10.77.0.9") < at("DHCPNAK from 192.168.127.1"),
                "{said}"
            );
            assert!(at("DHCPNAK") < at("DHCPACK of 192.168.127.2"), "{said}");
        },
    );
}

#[test]
fn a_host_name_of_the_guests_is_a_claim_and_not_its_name() {
    staged(a_host_name_of_the_guests_is_a_claim_and_not_its_name, |world| {
        let (_up, socket) = world.up(&[]);
        let script = world.file("script", SCRIPT);
        world.open_to_all(&script);
        world.file("conf", "send host-name \"evil\";\n");
        let ended = guest(
            world,
            Path::new(&socket),
            "touch leases && $client -cf conf -lf leases tap0 && until [ -e end ]; do sleep 0.05; done",
            |world| {
                let mut vms = Vec::new();
                eventually("it is listed with what it claims", || {
                    vms = world.list(&["vm", "list"]);
                    vms.iter().any(|vm| vm["claimedHostname"] == "evil")
                });
                assert_eq!(vms.len(), 1, "{vms:?}");
                assert_eq!(vms[0]["name"], "web", "{vms:?}");
                let by_claim = world.try_vnetctl(&["vm", "show", "evil"]);
                assert_eq!(by_claim.code, 1, "{by_claim:?}");
                fs::write(world.work().join("end"), "").unwrap();
            },
        );
        assert_eq!(ended.code, 0, "{ended:?}");
    });
}

/// Runs a script in a guest that has no address yet; `meanwhile`, something else.
fn guest(world: &World, socket: &Path, script: &str, meanwhile: impl FnOnce(&World)) -> Ended {
    let client = "client='dhclient -1 -sf ./script -pf pid'";
    let mut command = world.program(binaries::binary("vnet-load"));
    command
        .args(["guest", "--no-address", "--socket"])
        .arg(socket)
        .args(["--", "sh", "-c", &format!("{client}; {script}")]);
    let running = Running::start(command);
    meanwhile(world);
    running.wait()
}

/// The VMs' IPv4 addresses; the others they make themselves.
fn addresses(world: &World) -> Vec<String> {
    let vms = world.list(&["vm", "list"]);
    let of = |vm: &serde_json::Value| vm["addresses"].as_array().cloned().unwrap_or_default();
    vms.iter()
        .flat_map(of)
        .filter_map(|address| address.as_str().map(str::to_owned))
        .filter(|address| !address.contains(':'))
        .collect()
}
