//! The golden table of flags: what they come to, and exactly what is said of bad ones.

use clap::Parser as _;

use super::*;
use crate::args::Cli;
use crate::zone::{Owner, ZoneRecord};

const LINK: [&str; 2] = ["--listen-qemu", "unix:///run/q.sock"];
const CONTROLPLANE: [&str; 2] = ["--controlplane", "unix:///run/session.sock"];

fn args(flags: &[&str]) -> Args {
    Cli::try_parse_from(std::iter::once("vnet-dataplane").chain(flags.iter().copied()))
        .unwrap()
        .args
}

/// With a controlplane and a link, so that only what is under test can be wrong.
fn check(flags: &[&str]) -> Result<Config, Vec<String>> {
    let flags: Vec<&str> = CONTROLPLANE
        .into_iter()
        .chain(LINK)
        .chain(flags.iter().copied())
        .collect();
    check_bare(&flags)
}

fn check_bare(flags: &[&str]) -> Result<Config, Vec<String>> {
    check_with(flags, VmSettings::default())
}

fn check_with(flags: &[&str], settings: VmSettings) -> Result<Config, Vec<String>> {
    Config::new(&args(flags), settings, "host-1")
        .map_err(|problems| problems.to_string().lines().map(ToOwned::to_owned).collect())
}

fn ipv4(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

#[test]
fn without_flags_everything_is_as_under_gvproxy() {
    let config = check(&[]).unwrap();
    let network = &config.network;

    assert_eq!(
        config.controlplane,
        ControlplaneUrl::Unix("/run/session.sock".into())
    );
    assert_eq!(
        (config.name.as_str(), network.name.as_str()),
        ("host-1", "host-1")
    );
    assert_eq!(network.subnet.to_string(), "192.168.127.0/24");
    assert_eq!(network.gateway, ipv4("192.168.127.1"));
    assert_eq!(network.gateway_mac.to_string(), "5a:94:ef:e4:0c:dd");
    assert_eq!(network.host_alias, Some(ipv4("192.168.127.254")));
    assert_eq!(network.first_guest, ipv4("192.168.127.2"));
    assert_eq!(network.mtu_bytes, 1500);
    assert_eq!(
        network.ipv6.map(|net| net.to_string()).as_deref(),
        Some("fd00::/64")
    );
    assert_eq!(
        (
            network.resolvers.len(),
            &network.search,
            network.static_leases.len()
        ),
        (0, &SearchDomains::These(Vec::new()), 0)
    );
    let zones: Vec<String> = network.zones.iter().map(describe).collect();
    assert_eq!(
        zones,
        [
            "containers.internal: gateway=192.168.127.1 host=192.168.127.254",
            "docker.internal: gateway=192.168.127.1 host=192.168.127.254",
        ]
    );
    let [listener] = &config.listeners[..] else {
        panic!("{config:?}")
    };
    assert_eq!(listener.at, ListenAt::Unix("/run/q.sock".into()));
    assert_eq!(listener.transport, Transport::Qemu);
    assert_eq!(listener.vm.name, "vm");
    assert_eq!(listener.vm.resolver_patience, Duration::from_secs(4));
    assert!(config.forwards.is_empty());
}

fn describe(zone: &Zone) -> String {
    let mut text = zone.name.as_ref().map_or(".".to_owned(), ToString::to_string) + ":";
    for ZoneRecord { owner, address } in &zone.records {
        let name = match owner {
            Owner::Apex => "@".to_owned(),
            Owner::Name(name) => name.to_string(),
            Owner::Pattern(name, pattern) => {
                format!("{}/{pattern}/", name.as_ref().map_or("", |name| name.as_str()))
            }
        };
        let address = address.map_or("upstream".to_owned(), |a| a.to_string());
        text.push_str(&format!(" {name}={address}"));
    }
    if let Some(address) = zone.default_address {
        text.push_str(&format!(" *={address}"));
    }
    text
}

#[test]
fn ipv6_follows_its_prefix_and_is_off_when_asked_or_where_the_link_is_too_narrow() {
    let prefix = |flags: &[&str]| check(flags).unwrap().network.ipv6.map(|net| net.to_string());
    assert_eq!(
        prefix(&["--ipv6-prefix", "2001:db8:1:2::/64"]).as_deref(),
        Some("2001:db8:1:2::/64")
    );
    assert_eq!(prefix(&["--ipv6-prefix", "off"]), None);
    assert_eq!(prefix(&["--mtu", "1279"]), None);
    assert!(prefix(&["--mtu", "1280"]).is_some());
    let config = check(&["--publish", "[::1]:80:[fd00::2]:80"]).unwrap();
    assert_eq!(config.forwards[0].target, "[fd00::2]:80".parse().unwrap());
}

#[test]
fn the_network_follows_its_subnet() {
    let network = check(&["--subnet", "10.5.0.0/29", "--gateway", "10.5.0.6"])
        .unwrap()
        .network;
    assert_eq!(
        network.host_alias,
        Some(ipv4("10.5.0.5")),
        "the last address is the gateway's"
    );
    assert_eq!(network.first_guest, ipv4("10.5.0.1"));

    let network = check(&["--host-alias", "none"]).unwrap().network;
    assert_eq!(network.host_alias, None);
    assert_eq!(
        describe(&network.zones[0]),
        "containers.internal: gateway=192.168.127.1"
    );
}

#[test]
fn sockets_name_and_pin_their_vms() {
    let config = check(&[
        "--vm",
        "web",
        "--label",
        "team=a",
        "--label",
        "vnet.io/tier=1",
        "--listen-qemu",
        "tcp://[::1]:4444?name=db&mac=5A:94:ef:00:00:02&ip=192.168.127.9",
        "--listen-vfkit",
        "unixgram:///run/a%3Fb.sock",
    ])
    .unwrap();

    let [first, second, third] = &config.listeners[..] else {
        panic!("{config:?}")
    };
    assert_eq!((first.vm.name.as_str(), second.vm.name.as_str()), ("web", "db"));
    assert_eq!(second.at, ListenAt::Tcp("[::1]:4444".parse().unwrap()));
    assert_eq!(second.vm.mac.unwrap().to_string(), "5a:94:ef:00:00:02");
    assert_eq!(second.vm.address, Some(ipv4("192.168.127.9")));
    assert_eq!(second.vm.labels["team"], "a");
    assert_eq!(third.transport, Transport::Vfkit);
    assert_eq!(third.at, ListenAt::Unix("/run/a?b.sock".into()));
    assert_eq!(
        (third.vm.mac, third.vm.address),
        (None, None),
        "a pin is for its own socket"
    );
}

#[test]
fn run_hands_everything_over_by_descriptors() {
    let settings = VmSettings::read(
        br#"{"own_policy": {"document": "defaultAction: deny\n", "source": "p.yaml", "rules": ["allow tcp 10.0.0.1:80"]},
             "mode": "ask", "ec2_metadata_access": true, "resolver_patience_ms": 30000, "labels": {"run": "1"}}"#
            .as_slice(),
    )
    .unwrap();
    let config = check_with(
        &[
            "--controlplane",
            "fd://3",
            "--link-fd",
            "4",
            "--exit-with-fd",
            "5",
            "--ready-fd",
            "6",
        ],
        settings,
    )
    .unwrap();

    assert_eq!(config.controlplane, ControlplaneUrl::Fd(3));
    assert_eq!((config.exit_with_fd, config.ready_fd), (Some(5), Some(6)));
    let (fd, vm) = config.link.unwrap();
    assert_eq!(
        (fd, vm.mode, vm.ec2_metadata_access, vm.resolver_patience),
        (4, Some(Mode::Ask), true, Duration::from_secs(30))
    );
    assert_eq!(vm.labels["run"], "1");
    assert_eq!(vm.own_policy.unwrap().rules, ["allow tcp 10.0.0.1:80"]);
}

#[test]
fn a_policy_of_nothing_is_refused_and_not_passed_on_as_none() {
    for own in [
        r#"{"source": "p.yaml"}"#,
        r#"{"document": "", "source": "p.yaml"}"#,
        r#"{"document": "\n ", "source": "p.yaml", "rules": ["allow tcp 10.0.0.1:80"]}"#,
    ] {
        let settings = VmSettings::read(format!("{{\"own_policy\": {own}}}").as_bytes()).unwrap();

        let problems = check_with(&["--controlplane", "fd://3", "--link-fd", "4"], settings).unwrap_err();

        let expected = "VM settings: policy \"p.yaml\" is empty (expected at least defaultAction: deny)";
        assert_eq!(problems, [expected], "{own}");
    }
}

#[test]
fn zones_resolvers_leases_and_forwards_are_read() {
    let config = check(&[
        "--zone",
        "Docker.internal:db=192.168.127.9,1=192.168.127.8,@=192.168.127.7,*=2001:db8::1",
        "--dns",
        "9.9.9.9",
        "--dns",
        "[2620:fe::fe]:5353",
        "--dns",
        "2620:fe::9",
        "--dns-search",
        "Example.COM.",
        "--static-lease",
        "5a:94:ef:00:00:02=192.168.127.9",
        "-p",
        "8080:80",
        "-p",
        "[::1]:5353:192.168.127.9:53/udp",
    ])
    .unwrap();

    let zones: Vec<String> = config.network.zones.iter().map(describe).collect();
    assert_eq!(
        zones,
        [
            "docker.internal: db=192.168.127.9 1=192.168.127.8 @=192.168.127.7 *=2001:db8::1",
            "containers.internal: gateway=192.168.127.1 host=192.168.127.254",
        ]
    );
    let resolvers: Vec<String> = config.network.resolvers.iter().map(ToString::to_string).collect();
    assert_eq!(resolvers, ["9.9.9.9:53", "[2620:fe::fe]:5353", "[2620:fe::9]:53"]);
    assert_eq!(
        config.network.search,
        SearchDomains::These(vec!["example.com".parse().unwrap()])
    );
    assert_eq!(config.network.static_leases[0].1, ipv4("192.168.127.9"));
    let forwards: Vec<String> = config
        .forwards
        .iter()
        .map(|f| format!("{} {} {}", f.protocol, f.listen, f.target))
        .collect();
    assert_eq!(
        forwards,
        [
            "tcp 127.0.0.1:8080 192.168.127.2:80",
            "udp [::1]:5353 192.168.127.9:53"
        ]
    );
}

#[test]
fn every_transport_has_its_sockets() {
    let config = check(&[
        "--listen-vfkit",
        "unixgram:///run/v.sock?name=mac",
        "--listen-vfkit",
        "fd://7?mac=5a:94:ef:00:00:02",
        "--listen-bess",
        "fd://8",
        "--listen-vpnkit",
        "tcp://127.0.0.1:0",
        "--listen",
        "unix:///run/n.sock?name=dev&ip=192.168.127.9",
        "--listen-stdio",
        "accept",
        "--vpnkit-mac",
        "C3D68012-0208-11ea-9fd7-f2189899ab08=5a:94:ef:e4:0c:ee",
    ])
    .unwrap();
    let listeners: Vec<String> = config
        .listeners
        .iter()
        .map(|l| format!("{} {} {}", l.transport.word(), l.at, l.vm.name))
        .collect();
    assert_eq!(
        listeners,
        [
            "qemu /run/q.sock vm",
            "vfkit /run/v.sock mac",
            "vfkit fd://7 vm",
            "bess fd://8 vm",
            "vpnkit 127.0.0.1:0 vm",
            "connect /run/n.sock dev"
        ]
    );
    assert_eq!(
        config.listeners[2].vm.mac.unwrap().to_string(),
        "5a:94:ef:00:00:02"
    );
    assert_eq!(config.stdio.unwrap().name, "vm");
    assert_eq!(
        config.vpnkit_macs["c3d68012-0208-11ea-9fd7-f2189899ab08"].to_string(),
        "5a:94:ef:e4:0c:ee"
    );
    assert!(check_bare(&[&CONTROLPLANE[..], &["--listen-stdio", "accept"]].concat()).is_ok());
}

#[cfg(target_os = "linux")]
#[test]
fn vsock_and_records_are_read_on_linux() {
    let config = check(&[
        "--listen-qemu",
        "vsock://:1024",
        "--listen-vpnkit",
        "vsock://2:1024",
        "--listen-bess",
        "unixpacket:///run/b.sock",
    ])
    .unwrap();
    let at: Vec<String> = config.listeners.iter().map(|l| l.at.to_string()).collect();
    assert_eq!(
        at,
        ["/run/q.sock", "vsock://:1024", "/run/b.sock", "vsock://2:1024"]
    );
    for bad in [
        "vsock://",
        "vsock://2",
        "vsock://2:",
        "vsock://x:1",
        "vsock://2:+1",
        "vsock://:4294967295",
    ] {
        let said = check(&["--listen-qemu", bad]).unwrap_err();
        let expected = format!(
            "--listen-qemu {bad}: expected a context and a port, as vsock://2:1024, or vsock://:1024 for any context"
        );
        assert_eq!(said, [expected]);
    }
}

#[test]
fn zones_have_patterns_between_slashes_and_the_root_comes_behind_the_default_ones() {
    let config = check(&[
        "--zone",
        "crc.test:/^app-[0-9]{1,3}=?$/=10.0.0.1,x/a,b/=upstream,y=10.0.0.2,/c/d/=fd00::1,*=10.0.0.9",
        "--zone",
        ".:github.com=upstream",
        "--zone",
        "late.test:a=10.0.0.1",
    ])
    .unwrap();
    let zones: Vec<String> = config.network.zones.iter().map(describe).collect();
    assert_eq!(
        zones,
        [
            "crc.test: /^app-[0-9]{1,3}=?$/=10.0.0.1 x/a,b/=upstream y=10.0.0.2 /c/d/=fd00::1 *=10.0.0.9",
            "containers.internal: gateway=192.168.127.1 host=192.168.127.254",
            "docker.internal: gateway=192.168.127.1 host=192.168.127.254",
            ".: github.com=upstream",
            "late.test: a=10.0.0.1",
        ]
    );
    for (zone, why) in [
        (
            "a.test:/x=10.0.0.1",
            "--zone \"a.test:/x=10.0.0.1\" is not a zone",
        ),
        (
            "a.test:/x/10.0.0.1",
            "--zone \"a.test:/x/10.0.0.1\" is not a zone",
        ),
        ("a.test:=10.0.0.1", "--zone \"a.test:=10.0.0.1\" is not a zone"),
        ("a.test:", "--zone \"a.test:\" is not a zone"),
        (
            "a.test://=10.0.0.1",
            "--zone \"a.test://=10.0.0.1\" is not a zone",
        ),
        (
            "a.test:/(/=10.0.0.1",
            "--zone \"a.test:/(/=10.0.0.1\": pattern \"(\" cannot be used: unclosed group",
        ),
        (
            "a.test:@/x/=10.0.0.1",
            "--zone \"a.test:@/x/=10.0.0.1\": \"@\" is not a name",
        ),
    ] {
        let problems = check(&["--zone", zone]).unwrap_err();
        assert!(
            problems.len() == 1 && problems[0].starts_with(why),
            "{problems:?}"
        );
    }
}

#[test]
fn zones_that_vms_bring_are_the_only_ones() {
    let read = |zones: &str| {
        let settings = VmSettings::read(format!("{{\"zones\": {zones}}}").as_bytes()).unwrap();
        check_with(
            &[
                "--controlplane",
                "fd://3",
                "--link-fd",
                "4",
                "--zone",
                "flag.test:a=10.0.0.1",
            ],
            settings,
        )
    };
    let config = read(
        r#"[{"name": ".", "records": [{"name": "a.b", "address": ""}, {"regexp": "^x", "address": "10.0.0.1"}]},
            {"name": "b.test", "default_address": "10.0.0.9"}]"#,
    )
    .unwrap();
    let zones: Vec<String> = config.network.zones.iter().map(describe).collect();
    assert_eq!(zones, [".: a.b=upstream /^x/=10.0.0.1", "b.test: *=10.0.0.9"]);
    assert_eq!(read("[]").unwrap().network.zones, []);
    assert_eq!(
        read(r#"[{"name": "a.test", "records": [{"regexp": "("}]}, {"name": "b..c"}]"#).unwrap_err(),
        [
            "VM settings: zone a.test: records[0].regexp cannot be used: unclosed group",
            "VM settings: zone name \"b..c\" is none: the name begins with a dot, or has two in a row (expected one as \
             a.example.com)",
        ]
    );
}

#[test]
fn zones_and_their_patterns_are_bounded_and_search_domains_are_the_hosts_alone_or_none_of_its() {
    let many = |count: usize, zone: &dyn Fn(usize) -> String| -> Vec<String> {
        (0..count).flat_map(|n| ["--zone".to_owned(), zone(n)]).collect()
    };
    let check_all = |flags: Vec<String>| check(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(
        check_all(many(254, &|n| format!("z{n}.test:a=10.0.0.1")))
            .unwrap()
            .network
            .zones
            .len(),
        256
    );
    assert_eq!(
        check_all(many(255, &|n| format!("z{n}.test:a=10.0.0.1"))).unwrap_err(),
        ["255 zones are given (at most 254)"]
    );
    let pattern = |n: usize| format!("z{n}.test:{}", "/x/=10.0.0.1,".repeat(129) + "/y/=10.0.0.1");
    assert_eq!(
        check_all(many(2, &pattern)).unwrap_err(),
        ["the zones have 260 patterns (at most 256)"]
    );

    assert_eq!(
        check(&["--dns-search", "host"]).unwrap().network.search,
        SearchDomains::Host
    );
    assert_eq!(
        check(&["--dns-search", "host."]).unwrap().network.search,
        SearchDomains::These(vec!["host".parse().unwrap()])
    );
    let mixed = check(&["--dns-search", "host", "--dns-search", "a.test"]).unwrap_err();
    assert!(
        mixed[0].starts_with("--dns-search host is the host's own"),
        "{mixed:?}"
    );
}

#[test]
fn bad_flags_are_refused_in_these_words() {
    let long = format!("unix:///{}", "a".repeat(200));
    let too_long = format!(
        "--listen-qemu {long}: the path is 201 bytes long, and a socket's may have {}; use a shorter one",
        if cfg!(target_os = "linux") { 107 } else { 103 }
    );
    let table: &[(&[&str], &str)] = &[
        (
            &["--name", "a b"],
            "--name \"a b\" is not a name (expected 1 to 63 of letters, digits, '.', '_' and '-')",
        ),
        (
            &["--vm", ""],
            "--vm \"\" is not a name (expected 1 to 63 of letters, digits, '.', '_' and '-')",
        ),
        (
            &["--label", "team"],
            "--label \"team\" has no value (expected KEY=VALUE)",
        ),
        (
            &["--label", ".x=1"],
            "--label \".x=1\" has a key that is not 1 to 63 of letters, digits, '.', '_', '-' and '/'",
        ),
        (
            &["--label", "x="],
            "--label \"x=\" has a value that is not 1 to 63 of letters, digits, '.', '_' and '-'",
        ),
        (
            &["--label", "x=1", "--label", "x=2"],
            "--label x is given twice with different values",
        ),
        (
            &["--listen", "fd://7"],
            "--listen fd://7: expected unix:///PATH, tcp://127.0.0.1:PORT or vsock://CID:PORT",
        ),
        (
            &["--listen", "tcp://0.0.0.0:8080"],
            "--listen tcp://0.0.0.0:8080: 0.0.0.0:8080 is not a loopback address; guests over TCP are served on loopback only",
        ),
        (
            &["--listen", "unix:///run/q.sock"],
            "--listen unix:///run/q.sock: another flag listens there too; give each a place of its own",
        ),
        (
            &["--listen-bess", "unix:///a"],
            "--listen-bess unix:///a: expected unixpacket:///PATH or fd://N",
        ),
        (
            &["--listen-vpnkit", "fd://9"],
            "--listen-vpnkit fd://9: expected unix:///PATH, tcp://127.0.0.1:PORT or vsock://CID:PORT",
        ),
        (
            &["--listen-vpnkit", "unix:///run/q.sock"],
            "--listen-vpnkit unix:///run/q.sock: another flag listens there too; give each a place of its own",
        ),
        (
            &["--listen-stdio", ""],
            "--listen-stdio is empty (expected any text, as accept)",
        ),
        (
            &["--listen-stdio", "a", "--listen-stdio", "b"],
            "--listen-stdio is given 2 times (one guest has standard input and output)",
        ),
        (
            &["--vpnkit-mac", "5a:94:ef:e4:0c:ee"],
            "--vpnkit-mac \"5a:94:ef:e4:0c:ee\" is not a VM's address (expected UUID=MAC)",
        ),
        (
            &[
                "--vpnkit-mac",
                "c3d68012-0208-11ea-9fd7-f2189899ab0=5a:94:ef:e4:0c:ee",
            ],
            "--vpnkit-mac \"c3d68012-0208-11ea-9fd7-f2189899ab0=5a:94:ef:e4:0c:ee\" is not a VM's address (expected \
             UUID=MAC)",
        ),
        (
            &["--vpnkit-mac", "c3d68012-0208-11ea-9fd7-f2189899ab08=x"],
            "--vpnkit-mac x is not a unicast MAC address (expected one as 5a:94:ef:00:00:02)",
        ),
        (
            &[
                "--vpnkit-mac",
                "c3d68012-0208-11ea-9fd7-f2189899ab08=5a:94:ef:e4:0c:ee",
                "--vpnkit-mac",
                "C3D68012-0208-11EA-9FD7-F2189899AB08=5a:94:ef:e4:0c:ef",
            ],
            "--vpnkit-mac C3D68012-0208-11EA-9FD7-F2189899AB08 is given twice for this UUID",
        ),
        (
            &["--listen-qemu", "fd://x"],
            "--listen-qemu fd://x: expected the number of an inherited descriptor, as fd://3",
        ),
        (
            &["--listen-qemu", "fd://2"],
            "--listen-qemu 2 is not a descriptor that can be inherited (expected 3 or above)",
        ),
        (
            &["--listen-vfkit", "fd://7", "--listen-qemu", "fd://7"],
            "--listen-vfkit 7 is the descriptor of --listen-qemu already",
        ),
        (
            &["--listen-bess", "fd://7", "--exit-with-fd", "7"],
            "--listen-bess 7 is the descriptor of --exit-with-fd already",
        ),
        (
            &["--listen-qemu", "/run/q.sock"],
            "--listen-qemu /run/q.sock: expected unix:///PATH, tcp://127.0.0.1:PORT, vsock://CID:PORT or fd://N",
        ),
        (
            &["--listen-vfkit", "unix:///run/v.sock"],
            "--listen-vfkit unix:///run/v.sock: expected unixgram:///PATH or fd://N",
        ),
        (
            &["--listen-qemu", "unix://run/q.sock"],
            "--listen-qemu unix://run/q.sock: the path must be absolute, as in unix:///run/vm.sock",
        ),
        (&["--listen-qemu", &long], &too_long),
        (
            &["--listen-qemu", "unix:///a%2"],
            "--listen-qemu unix:///a%2: \"/a%2\" is not percent-encoded text (write % as %25 and ? as %3F)",
        ),
        (
            &["--listen-qemu", "tcp://localhost:1"],
            "--listen-qemu tcp://localhost:1: expected an address and a port, as tcp://127.0.0.1:4444",
        ),
        (
            &["--listen-qemu", "tcp://0.0.0.0:1"],
            "--listen-qemu tcp://0.0.0.0:1: 0.0.0.0:1 is not a loopback address; guests over TCP are served on \
             loopback only",
        ),
        (
            &["--listen-qemu", "unix:///a?nmae=x"],
            "--listen-qemu unix:///a?nmae=x: unknown parameter \"nmae\" (did you mean name?)",
        ),
        (
            &["--listen-qemu", "unix:///a?bridge=x"],
            "--listen-qemu unix:///a?bridge=x: unknown parameter \"bridge\" (expected name, mac or ip)",
        ),
        (
            &["--listen-qemu", "unix:///a?name=x&name=y"],
            "--listen-qemu unix:///a?name=x&name=y: parameter name is given twice",
        ),
        (
            &["--listen-qemu", "unix:///a?mac=01:00:5e:00:00:01"],
            "--listen-qemu unix:///a?mac=01:00:5e:00:00:01: mac=01:00:5e:00:00:01 is not a unicast MAC address \
             (expected one as 5a:94:ef:00:00:02)",
        ),
        (
            &["--listen-qemu", "unix:///a?ip=::1"],
            "--listen-qemu unix:///a?ip=::1: ip=::1 is not an IPv4 address (expected one as 192.168.127.2)",
        ),
        (
            &["--listen-qemu", "unix:///a?name=%20"],
            "--listen-qemu unix:///a?name=%20: name= is not a name (expected 1 to 63 of letters, digits, '.', '_' \
             and '-')",
        ),
        (
            &["--listen-qemu", "unix:///a?ip=192.168.127.1"],
            "--listen-qemu 192.168.127.1 is the address of the gateway already",
        ),
        (
            &["--listen-qemu", "unix:///run/q.sock?name=x"],
            "--listen-qemu unix:///run/q.sock?name=x: another flag listens there too; give each a place of its own",
        ),
        (
            &["--mtu", "575"],
            "--mtu 575 is out of range (expected 576 to 65520)",
        ),
        (
            &["--mtu", "65521"],
            "--mtu 65521 is out of range (expected 576 to 65520)",
        ),
        (
            &["--mtu", "big"],
            "--mtu big is out of range (expected 576 to 65520)",
        ),
        (
            &["--ipv6-prefix", "fd00::/48"],
            "--ipv6-prefix fd00::/48 is not an IPv6 prefix of 64 bits (expected one as fd00::/64, or off)",
        ),
        (
            &["--ipv6-prefix", "none"],
            "--ipv6-prefix none is not an IPv6 prefix of 64 bits (expected one as fd00::/64, or off)",
        ),
        (
            &["--ipv6-prefix", "fd00::1/64"],
            "--ipv6-prefix fd00::1/64 has bits set beyond its prefix length (did you mean fd00::/64?)",
        ),
        (
            &["--ipv6-prefix", "fe80::/64"],
            "--ipv6-prefix fe80::/64 is loopback, link-local, multicast, or carries IPv4 addresses, which guests cannot have",
        ),
        (
            &["--ipv6-prefix", "64:ff9b::/64"],
            "--ipv6-prefix 64:ff9b::/64 is loopback, link-local, multicast, or carries IPv4 addresses, which guests cannot have",
        ),
        (
            &["--mtu", "1000", "--ipv6-prefix", "fd00::/64"],
            "--ipv6-prefix cannot be had with --mtu 1000 (IPv6 needs 1280 at least)",
        ),
        (
            &["--publish", "80:[fd00::1]:80"],
            "--publish 80:[fd00::1]:80: fd00::1 is not an address of subnet fd00::/64 that a guest can have",
        ),
        (
            &["--subnet", "10.0.0.0"],
            "--subnet 10.0.0.0 is not an IPv4 subnet (expected one as 192.168.127.0/24)",
        ),
        (
            &["--subnet", "10.0.0.0/30"],
            "--subnet 10.0.0.0/30 is of no use for guests (expected /8 to /29)",
        ),
        (
            &["--subnet", "10.0.0.1/24"],
            "--subnet 10.0.0.1/24 has bits set beyond its prefix length (did you mean 10.0.0.0/24?)",
        ),
        (
            &["--subnet", "169.254.0.0/24"],
            "--subnet 169.254.0.0/24 is loopback, link-local or multicast, which guests cannot have",
        ),
        (&["--gateway", "gw"], "--gateway gw is not an IPv4 address"),
        (
            &["--gateway", "10.0.0.1"],
            "--gateway 10.0.0.1 is not a guest address of subnet 192.168.127.0/24",
        ),
        (
            &["--gateway", "192.168.127.255"],
            "--gateway 192.168.127.255 is not a guest address of subnet 192.168.127.0/24",
        ),
        (
            &["--host-alias", "off"],
            "--host-alias off is not an IPv4 address (expected one, or none)",
        ),
        (
            &["--host-alias", "192.168.127.1"],
            "--host-alias 192.168.127.1 is the address of the gateway already",
        ),
        (
            &["--gateway-mac", "5a:94:ef:e4:0c"],
            "--gateway-mac 5a:94:ef:e4:0c is not a unicast MAC address (expected one as 5a:94:ef:00:00:02)",
        ),
        (
            &["--static-lease", "x"],
            "--static-lease \"x\" is not a lease (expected MAC=ADDRESS)",
        ),
        (
            &["--static-lease", "5a:94:ef:00:00:02=192.168.127.254"],
            "--static-lease 192.168.127.254 is the address of the host alias already",
        ),
        (
            &[
                "--static-lease",
                "5a:94:ef:00:00:02=192.168.127.9",
                "--static-lease",
                "5a:94:ef:00:00:03=192.168.127.9",
            ],
            "--static-lease 192.168.127.9 is the address of 5a:94:ef:00:00:02 already",
        ),
        (
            &[
                "--static-lease",
                "5a:94:ef:00:00:02=192.168.127.8",
                "--static-lease",
                "5a:94:ef:00:00:02=192.168.127.9",
            ],
            "--static-lease 5a:94:ef:00:00:02 is given twice for this MAC address",
        ),
        (
            &["--dns", "dns.example"],
            "--dns \"dns.example\" is not an address (expected ADDRESS or ADDRESS:PORT, as 9.9.9.9 or \
             [2620:fe::fe]:53)",
        ),
        (
            &["--dns", "192.168.127.1"],
            "--dns 192.168.127.1 is the gateway itself, which would ask itself for ever",
        ),
        (
            &["--dns-search", ""],
            "--dns-search \"\" is not a domain: the name is empty",
        ),
        (
            &["--zone", "a.test"],
            "--zone \"a.test\" is not a zone (expected ZONE:NAME=ADDRESS,... with * for every other name, or /PATTERN/)",
        ),
        (
            &["--zone", "a.test:x=y"],
            "--zone \"a.test:x=y\": \"y\" is not an address",
        ),
        (
            &["--zone", "a.test:x y=10.0.0.1"],
            "--zone \"a.test:x y=10.0.0.1\": \"x y\" is not a name: \"x y\" has a character that a name cannot have",
        ),
        (
            &["--zone", "a.test:x=10.0.0.1", "--zone", "A.test:y=10.0.0.1"],
            "--zone a.test is given twice",
        ),
        (
            &["-p", "8080"],
            "--publish is wrong: \"8080\" is not a forward (expected [ADDRESS:]PORT:[GUEST:]PORT[/tcp|/udp][+client], as 8080:80, or unix:///PATH:[GUEST:]PORT)",
        ),
        (
            &["-p", "80:10.0.0.1:80"],
            "--publish 80:10.0.0.1:80: 10.0.0.1 is not an address of subnet 192.168.127.0/24 that a guest can have",
        ),
        (
            &["-p", "80:80", "-p", "80:81"],
            "--publish 80:81: another --publish listens there too",
        ),
        (
            &["--link-fd", "1"],
            "--link-fd 1 is not a descriptor that can be inherited (expected 3 or above)",
        ),
        (
            &["--link-fd", "5", "--exit-with-fd", "5"],
            "--exit-with-fd 5 is the descriptor of --link-fd already",
        ),
        (
            &["--front-fd", "2"],
            "--front-fd 2 is not a descriptor that can be inherited (expected 3 or above)",
        ),
        (
            &["--front-fd", "5", "--ready-fd", "5"],
            "--ready-fd 5 is the descriptor of --front-fd already",
        ),
        (
            &["--guest-api"],
            "--guest-api needs --front-fd: it is the front that serves it",
        ),
    ];
    for (flags, message) in table {
        assert_eq!(check(flags).err(), Some(vec![(*message).to_owned()]), "{flags:?}");
    }
}

#[test]
fn a_controlplane_must_be_given_and_be_one_that_is_built() {
    for (url, message) in [
        (
            "https://cp.example:7443",
            "--controlplane https://cp.example:7443: https is not built yet; use unix:///PATH",
        ),
        (
            "tcp://127.0.0.1:7443",
            "--controlplane tcp://127.0.0.1:7443: a session over tcp needs TLS, which is not built yet; use unix:///PATH",
        ),
        ("fd://x", "--controlplane fd://x: expected unix:///PATH or fd://N"),
        (
            "/run/session.sock",
            "--controlplane /run/session.sock: expected unix:///PATH or fd://N",
        ),
        (
            "unix://session.sock",
            "--controlplane unix://session.sock: the path must be absolute, as in unix:///run/vm.sock",
        ),
    ] {
        let flags = ["--controlplane", url, LINK[0], LINK[1]];
        assert_eq!(check_bare(&flags).err(), Some(vec![message.to_owned()]), "{url}");
    }
    assert_eq!(
        check_bare(&[]).err(),
        Some(vec![
            "--controlplane is not given (expected unix:///PATH of the controlplane's session socket)"
                .to_owned(),
            "no guest can attach: give one of --listen, --listen-qemu, --listen-vfkit, --listen-bess, --listen-vpnkit \
             and --listen-stdio"
                .to_owned(),
        ])
    );
}

#[test]
fn every_problem_is_reported_at_once() {
    let problems = check(&[
        "--mtu",
        "1",
        "--vm",
        "/",
        "--subnet",
        "x",
        "-p",
        "y",
        "--listen-stdio",
        "",
    ]);
    assert_eq!(problems.unwrap_err().len(), 5);
}

#[test]
fn the_lists_of_a_policy_come_through_the_settings_as_they_are() {
    let list = OwnListSettings {
        path: "lists/a.txt".to_owned(),
        sha256: "ab".repeat(32),
        content: (0..=255).collect(),
        size_bytes: 7,
    };
    let settings = VmSettings {
        own_policy: Some(OwnPolicySettings {
            document: Some("defaultAction: deny\n".to_owned()),
            lists: vec![list],
            ..Default::default()
        }),
        ..Default::default()
    };
    let written = serde_json::to_vec(&settings).unwrap();
    assert_eq!(VmSettings::read(written.as_slice()).unwrap(), settings);
}

#[test]
fn settings_with_an_unknown_key_or_too_long_are_refused() {
    let unknown = VmSettings::read(br#"{"modes": "ask"}"#.as_slice()).unwrap_err();
    let SettingsError::Json(cause) = &unknown else {
        panic!("{unknown}")
    };
    assert!(cause.to_string().contains("unknown field `modes`"), "{cause}");

    let long = format!("{{\"mode\": \"{}\"}}", "a".repeat(64 << 20));
    assert!(matches!(
        VmSettings::read(long.as_bytes()),
        Err(SettingsError::TooLong)
    ));

    let flags = [CONTROLPLANE[0], CONTROLPLANE[1], LINK[0], LINK[1]];
    let bad = VmSettings {
        mode: Some("open".into()),
        resolver_patience_ms: Some(0),
        ..VmSettings::default()
    };
    assert_eq!(
        check_with(&flags, bad).err(),
        Some(vec![
            "VM settings: a resolver patience of 0 ms is out of range (expected 1 to 300000)".to_owned(),
            "VM settings: \"open\" is not a mode (expected enforce, ask, observe, block or quarantine)"
                .to_owned(),
        ])
    );
}

/// What is dialled elsewhere, as text.
fn nat(config: &Config) -> Vec<String> {
    let nat = config.network.nat.iter();
    nat.map(|(from, to)| format!("{from}={to}")).collect()
}

#[test]
fn the_host_alias_is_one_of_what_is_dialled_elsewhere() {
    let alias = "192.168.127.254=127.0.0.1";
    assert_eq!(nat(&check(&[]).unwrap()), [alias]);
    let more = check(&["--nat", "192.168.127.9=10.0.0.7", "--nat", "203.0.113.5=::1"]).unwrap();
    assert_eq!(nat(&more), ["192.168.127.9=10.0.0.7", alias, "203.0.113.5=::1"]);
    assert_eq!(
        more.network.answered().map(|a| a.to_string()).collect::<Vec<_>>(),
        ["192.168.127.9", "192.168.127.254"],
        "ARP is answered for what lies in the subnet"
    );
    assert_eq!(more.network.other_nat().len(), 2);

    let other = check(&["--nat", "192.168.127.254=::ffff:10.0.0.7"]).unwrap();
    assert_eq!(
        nat(&other),
        ["192.168.127.254=10.0.0.7"],
        "in the place of 127.0.0.1"
    );
    assert_eq!(other.network.host_alias, Some(ipv4("192.168.127.254")));
    assert_eq!(other.network.other_nat().len(), 1);

    let none = check(&["--host-alias", "none"]).unwrap();
    assert_eq!((nat(&none).len(), none.network.answered().count()), (0, 0));
}

#[test]
fn virtual_addresses_lie_anywhere_and_are_no_guests() {
    let config = check(&[
        "--virtual-ip=192.168.127.2",
        "--virtual-ip=10.9.9.9",
        "--virtual-ip=10.9.9.9",
        "--virtual-ip=192.168.127.1",
        "--nat=192.168.127.3=127.0.0.1",
    ])
    .unwrap();
    assert_eq!(
        config.network.virtual_ips,
        ["192.168.127.2", "10.9.9.9", "192.168.127.1"].map(ipv4)
    );
    assert_eq!(
        config.network.first_guest,
        ipv4("192.168.127.4"),
        "the first that is free"
    );
}

#[test]
fn the_first_guest_may_be_another_and_forwards_lead_there() {
    let config = check(&["--first-guest", "192.168.127.10", "-p", "8080:80"]).unwrap();
    assert_eq!(config.network.first_guest, ipv4("192.168.127.10"));
    assert_eq!(config.forwards[0].target, "192.168.127.10:80".parse().unwrap());
    let leased = check(&[
        "--first-guest=192.168.127.10",
        "--static-lease=5a:94:ef:e4:0c:ee=192.168.127.10",
    ]);
    assert!(leased.is_ok(), "{leased:?}");
}

#[test]
fn without_default_zones_there_are_those_of_flags_alone() {
    assert!(check(&["--no-default-zones"]).unwrap().network.zones.is_empty());
    let own = check(&["--no-default-zones", "--zone", "docker.internal:host=10.0.0.1"]).unwrap();
    let zones: Vec<String> = own.network.zones.iter().map(describe).collect();
    assert_eq!(zones, ["docker.internal: host=10.0.0.1"]);
}

#[test]
fn what_is_wrong_with_addresses_that_the_gateway_stands_for_is_told() {
    let cases: &[(&[&str], &str)] = &[
        (
            &["--nat=10.0.0.1"],
            "--nat \"10.0.0.1\" is not a translation (expected ADDRESS=ADDRESS, as 192.168.127.253=127.0.0.1)",
        ),
        (
            &["--nat=fd00::9=127.0.0.1"],
            "--nat fd00::9=127.0.0.1: fd00::9 is no address that guests can send to (expected a unicast IPv4 address)",
        ),
        (
            &["--nat=127.0.0.1=10.0.0.1"],
            "--nat 127.0.0.1=10.0.0.1: 127.0.0.1 is no address that guests can send to (expected a unicast IPv4 address)",
        ),
        (
            &["--nat=10.0.0.1=0.0.0.0"],
            "--nat 10.0.0.1=0.0.0.0: 0.0.0.0 is no address that can be dialled (expected a unicast address of the \
             host or beyond)",
        ),
        (
            &["--nat=10.0.0.1=fe80::1"],
            "--nat 10.0.0.1=fe80::1: fe80::1 is no address that can be dialled (expected a unicast address of the \
             host or beyond)",
        ),
        (
            &["--nat=10.0.0.1=host"],
            "--nat 10.0.0.1=host: host is no address that can be dialled (expected a unicast address of the host or \
             beyond)",
        ),
        (
            &["--nat=10.0.0.1=192.168.127.2"],
            "--nat 10.0.0.1=192.168.127.2: 192.168.127.2 is an address for guests, and nat leads out of their network",
        ),
        (
            &["--nat=10.0.0.1=fd00::2"],
            "--nat 10.0.0.1=fd00::2: fd00::2 is an address for guests, and nat leads out of their network",
        ),
        (
            &["--nat=192.168.127.1=127.0.0.1"],
            "--nat 192.168.127.1 is the address of the gateway already",
        ),
        (
            &["--nat=192.168.127.255=127.0.0.1"],
            "--nat 192.168.127.255 is not a guest address of subnet 192.168.127.0/24",
        ),
        (
            &["--nat=198.18.0.7=127.0.0.1"],
            "--nat 198.18.0.7=127.0.0.1: 198.18.0.7 may be an answer to a lookup (198.18.0.0/16 is for synthetic \
             addresses)",
        ),
        (
            &["--nat=10.0.0.1=127.0.0.1", "--nat=10.0.0.1=127.0.0.2"],
            "--nat is given twice for 10.0.0.1",
        ),
        (&["--virtual-ip=x"], "--virtual-ip x is not an IPv4 address"),
        (
            &["--virtual-ip=224.0.0.1"],
            "--virtual-ip 224.0.0.1 is no address that guests can send to (expected a unicast IPv4 address)",
        ),
        (
            &["--virtual-ip=192.168.127.0"],
            "--virtual-ip 192.168.127.0 is not a guest address of subnet 192.168.127.0/24",
        ),
        (
            &[
                "--virtual-ip=192.168.127.9",
                "--static-lease=5a:94:ef:00:00:02=192.168.127.9",
            ],
            "--static-lease 192.168.127.9 is the address of a --virtual-ip already",
        ),
        (
            &["--nat=192.168.127.9=127.0.0.1", "--first-guest=192.168.127.9"],
            "--first-guest 192.168.127.9 is the address of a --nat already",
        ),
        (
            &["--first-guest=192.168.127.254"],
            "--first-guest 192.168.127.254 is the address of the host alias already",
        ),
        (
            &["--first-guest=10.0.0.1"],
            "--first-guest 10.0.0.1 is not a guest address of subnet 192.168.127.0/24",
        ),
    ];
    for (flags, said) in cases {
        assert_eq!(check(flags).err(), Some(vec![(*said).to_owned()]), "{flags:?}");
    }
}

#[test]
fn addresses_that_the_gateway_stands_for_are_bounded() {
    let many = |flag: &str, count: usize, end: &str| -> Vec<String> {
        (0..count).map(|n| format!("{flag}=10.1.0.{n}{end}")).collect()
    };
    for (flag, end) in [("--nat", "=127.0.0.1"), ("--virtual-ip", "")] {
        let most = many(flag, 64, end);
        let most: Vec<&str> = most.iter().map(String::as_str).collect();
        assert!(check(&most).is_ok());
        let more = many(flag, 65, end);
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        assert_eq!(
            check(&more).err(),
            Some(vec![format!("{flag} is given 65 times (at most 64)")])
        );
    }
}

#[test]
fn a_name_is_made_of_host_and_process() {
    let name = default_name();
    assert!(is_name(&name), "{name}");
    assert!(name.ends_with(&format!("-{}", std::process::id())), "{name}");
}
