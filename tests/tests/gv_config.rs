//! `gvproxy -config FILE`: one file with most of its keys, and what of them a guest, the host and a capture see.
#![cfg(target_os = "linux")]

use std::fs;

use nix::sys::signal::Signal;
use serde_json::Value;
use vnet_tests::{Running, World, eventually, http, notices, staged};

/// A guest whose address the file keeps; it is not the first one's.
const MAC: &str = "5a:94:ef:e4:0c:77";

const FILE: &str = r#"
listen: ["unix://RUN/api.sock"]
services: unix://RUN/services.sock
log-level: warning
interfaces: {qemu: "unix://RUN/web-gvproxy.sock"}
pid-file: RUN/gv.pid
log-file: RUN/gv.log
notification: RUN/notices.sock
stack:
  capture-file: RUN/all.pcapng
  mtu: 1400
  subnet: 10.7.0.0/16
  gatewayIP: 10.7.0.254
  deviceIP: 10.7.0.9
  hostIP: 10.7.0.253
  gatewayMacAddress: 5A-94-EF-E4-0C-01
  dns:
    - name: lab.internal.
      defaultIP: 10.7.0.253
      records:
        - {name: db, ip: 10.7.0.10}
        - {regexp: "^web-[0-9]+$", ip: 10.7.0.77}
    - name: bare.internal.
      records: [{name: only, ip: 10.7.0.11}]
  dnsSearchDomains: [lab.internal, corp.example]
  forwards:
    "127.0.0.1:8081": 10.7.0.77:80
    "udp:127.0.0.1:8082": 10.7.0.77:82
  nat:
    10.7.0.253: 127.0.0.1
    10.7.1.1: 127.0.0.2
    198.51.100.99: 203.0.113.10
  gatewayVirtualIPs: [10.7.0.253, 10.7.1.1]
  dhcpStaticLeases: {10.7.0.77: MAC, 10.7.0.9: "5a:94:ef:e4:0c:09"}
"#;

/// What the DHCP client calls: it tells what it was given, and takes it.
const SCRIPT: &str = r#"#!/bin/sh
[ -n "$new_ip_address" ] || exit 0
echo "$new_ip_address/$new_subnet_mask via $new_routers dns $new_domain_name_servers mtu $new_interface_mtu search $new_domain_search" > lease
ip addr add "$new_ip_address/16" dev "$interface"
ip link set "$interface" mtu "$new_interface_mtu"
ip route replace default via "$new_routers"
exit 0
"#;

/// What the guest does once it has an address; then it serves.
const GUEST: &str = r#"
touch leases && dhclient -1 -sf ./script -lf leases -pf pid tap0 || exit 1
cat lease
ping -c 1 -W 5 10.7.0.254 > /dev/null
ip neigh show 10.7.0.254 | grep -o 'lladdr [0-9a-f:]*'
for question in 'db.lab.internal A' 'web-12.lab.internal A' 'other.lab.internal A' 'only.bare.internal A' 'other.bare.internal A' \
    'host.containers.internal A'; do
    dig @10.7.0.254 +tries=1 +time=5 $question > answer
    echo "$question: $(grep -o 'status: [A-Z]*' answer | cut -d' ' -f2) $(dig @10.7.0.254 +short $question)"
done
for place in 10.7.0.253:8099 10.7.1.1:8098 198.51.100.99; do
    echo "$place: $(curl -sS -m 10 http://$place/)"
done
socat TCP-LISTEN:80,fork,reuseaddr SYSTEM:'echo from the guest' &
socat UDP-LISTEN:82,fork SYSTEM:'echo from the guest' &
echo serving
until [ -e end ]; do sleep 0.05; done
kill $(cat pid) %1 %2
"#;

fn printed(world: &World, program: &str, words: &[&str]) -> String {
    let mut command = world.program(program);
    command.args(words);
    let ended = Running::start(command).wait();
    assert_eq!(ended.code, 0, "{program} {words:?}: {ended:?}");
    ended.stdout
}

#[test]
fn each_key_of_a_file_is_seen_where_it_matters() {
    staged(each_key_of_a_file_is_seen_where_it_matters, |world| {
        let run = world.runtime_dir();
        let at = |name: &str| run.join(name).display().to_string();
        let _servers = [
            http(world.internet(), "203.0.113.10:80"),
            http(world.host(), "127.0.0.1:8099"),
            http(world.host(), "127.0.0.2:8098"),
        ];
        let told = notices::listen(&run.join("notices.sock"));
        let script = world.file("script", SCRIPT);
        world.open_to_all(&script);
        let file = FILE
            .replace("RUN", &run.display().to_string())
            .replace("MAC", MAC);
        let file = world.file("gv.yaml", &file).display().to_string();
        let gvproxy = Running::start(world.gvproxy(&["-strict", "-config", &file]));
        let socket = run.join("web-gvproxy.sock");
        eventually("its sockets are there", || {
            socket.exists() && run.join("services.sock").exists()
        });
        assert_eq!(
            fs::read_to_string(run.join("gv.pid")).unwrap(),
            gvproxy.pid().to_string()
        );

        let mut guest = world.load();
        guest
            .args(["guest", "--mac", MAC, "--no-address", "--socket"])
            .arg(&socket);
        guest.args(["--", "bash", "-c", GUEST]);
        let mut guest = Running::start(guest);
        let said = guest.prints("serving");
        let expected = "10.7.0.77/255.255.0.0 via 10.7.0.254 dns 10.7.0.254 mtu 1400 search lab.internal. corp.example.\n\
            lladdr 5a:94:ef:e4:0c:01\n\
            db.lab.internal A: NOERROR 10.7.0.10\n\
            web-12.lab.internal A: NOERROR 10.7.0.77\n\
            other.lab.internal A: NOERROR 10.7.0.253\n\
            only.bare.internal A: NOERROR 10.7.0.11\n\
            other.bare.internal A: NXDOMAIN \n\
            10.7.0.253:8099: this is 127.0.0.1:8099 at /\n\
            10.7.1.1:8098: this is 127.0.0.2:8098 at /\n\
            198.51.100.99: this is 203.0.113.10:80 at /\n\
            serving\n";
        // The file has zones, and so none but its own: this one was asked of the host's resolver, which is not there.
        let (others, own): (Vec<&str>, Vec<&str>) = said
            .lines()
            .partition(|line| line.starts_with("host.containers.internal"));
        assert_eq!(own.join("\n") + "\n", expected, "{}", guest.stderr());
        assert_eq!(others, ["host.containers.internal A: SERVFAIL "]);

        // From the host: forwards, and the services.
        let mut answers = Vec::new();
        eventually("the guest serves", || {
            let mut socat = world.program("sh");
            socat.args(["-c", "socat -u -T 5 tcp:127.0.0.1:8081 -"]);
            answers = Running::start(socat).wait().stdout.into_bytes();
            !answers.is_empty()
        });
        assert_eq!(answers, b"from the guest\n");
        eventually("and over UDP", || {
            let asked = "echo hello | socat -T 2 - udp:127.0.0.1:8082";
            printed(world, "sh", &["-c", asked]) == "from the guest\n"
        });
        let leases = printed(
            world,
            "curl",
            &[
                "-sS",
                "--unix-socket",
                &at("services.sock"),
                "http://x/services/dhcp/leases",
            ],
        );
        let leases: Value = serde_json::from_str(&leases).unwrap();
        assert_eq!(leases["10.7.0.77"], MAC, "{leases}");
        let zones = printed(
            world,
            "curl",
            &[
                "-sS",
                "--unix-socket",
                &at("api.sock"),
                "http://x/services/dns/all",
            ],
        );
        assert!(
            zones.contains("lab.internal") && !zones.contains("containers"),
            "{zones}"
        );
        assert_eq!(world.list(&["vm", "list"])[0]["name"], "web", "after its socket");

        fs::write(world.work().join("end"), "").unwrap();
        assert_eq!(guest.wait().code, 0);
        eventually("the end is told", || {
            let told = told.lock().unwrap();
            told.iter()
                .any(|notice| notice["notification_type"] == "connection_closed")
        });
        let notices = told.lock().unwrap();
        let of = |kind: &str| {
            notices
                .iter()
                .find(|notice| notice["notification_type"] == kind)
                .unwrap()
        };
        assert_eq!(of("connection_established")["mac_address"], MAC, "{notices:?}");
        assert_eq!(of("dhcp_assigned")["ip_address"], "10.7.0.77", "{notices:?}");
        gvproxy.signal(Signal::SIGTERM);
        let ended = gvproxy.wait();
        assert_eq!((ended.code, &*ended.stderr), (0, ""), "{ended:?}");
        assert_eq!(
            fs::read_to_string(run.join("gv.log")).unwrap(),
            "",
            "nothing to warn of"
        );

        // The capture has what was said, and in it the MTU: segments that fit.
        let fields = |filter: &str, field: &str| -> Vec<String> {
            let words = [
                "-n",
                "-r",
                &at("all.pcapng"),
                "-Y",
                filter,
                "-T",
                "fields",
                "-e",
                field,
            ];
            printed(world, "tshark", &words)
                .lines()
                .map(str::to_owned)
                .collect()
        };
        let answers = fields(
            "tcp.flags.syn == 1 && tcp.flags.ack == 1 && ip.src == 10.7.1.1",
            "tcp.options.mss_val",
        );
        assert_eq!(answers, ["1360"]);
        let gateway = fields(
            "arp.opcode == 2 && arp.src.proto_ipv4 == 10.7.0.254",
            "arp.src.hw_mac",
        );
        assert!(
            !gateway.is_empty() && gateway.iter().all(|mac| mac == "5a:94:ef:e4:0c:01"),
            "{gateway:?}"
        );
        for name in ["web-gvproxy.sock", "api.sock", "services.sock", "gv.pid"] {
            assert!(!run.join(name).exists(), "{name} is left behind");
        }
    });
}
