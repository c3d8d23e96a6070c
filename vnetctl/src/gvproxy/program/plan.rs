//! From the configuration to the dataplane's flags and to what its VMs bring along. Pure, but for names of this host
//! that a socket listens at, which `resolve` looks up.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::words::Words;
use crate::cmd::run::fnv1a;
use crate::cmd::treat::Treatment;
use crate::gvproxy::config::{Config, Endpoint, HostPort, LogLevel};
use crate::gvproxy::origin::Origin;
use crate::gvproxy::own::Own;
use crate::gvproxy::services::has_ipv6;
use crate::launch::{DataplaneArgs, Document, ListenAt, NAME_CHARACTERS_MAX, Settings};

/// What is to be started.
#[derive(Debug)]
pub struct Plan {
    /// The dataplane: its flags, how its VMs are treated, and its local zones, and no other.
    pub settings: Settings,
    /// What is logged: also what `stack.debug` asks for.
    pub log_level: LogLevel,
    /// Where the services API listens beside the sockets that carry `/connect`.
    pub services: Option<ListenAt>,
    /// The forwards among its flags, in the configuration's words.
    pub forwards: Vec<Opened>,
    /// What its flags are called by whoever typed gvproxy's.
    pub words: Words,
    /// What a person should know, a line each.
    pub warnings: Vec<String>,
}

/// A forward of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// Whether it is UDP rather than TCP.
    pub is_udp: bool,
    /// Where it listens, as it was written.
    pub local: String,
    /// Where it leads.
    pub remote: String,
    /// Where it really listens.
    pub listens: Vec<SocketAddr>,
}

/// Looks up a name of this host.
pub type Resolve<'a> = &'a dyn Fn(&str) -> io::Result<Vec<IpAddr>>;

/// Makes it. `policy` is the guests', wherever it was read from.
///
/// # Errors
/// Everything that is wrong, a line each.
pub fn plan(
    config: &Config,
    policy: Option<Document>,
    own: &Own,
    vm: &str,
    resolve: Resolve<'_>,
) -> Result<Plan, Vec<String>> {
    let mut problems = Vec::new();
    let stack = &config.stack;
    let interfaces = &config.interfaces;
    let mut words = Words::default();
    if let Some(from) = &interfaces.stdio {
        words.stdio(from);
    }
    let mut url = |flag: &'static str, at: &Option<Endpoint>| {
        let at = at.as_ref()?;
        let from = config.origins.get(at);
        match socket_url(at, from, resolve) {
            Ok(url) => {
                words.socket(flag, &url, at, named(at, from));
                Some(url)
            }
            Err(problem) => {
                problems.push(problem);
                None
            }
        }
    };
    // What leads to the host's loopback is its alias, by which zones and messages know it.
    let alias = stack
        .nat
        .iter()
        .find(|(at, to)| **at == stack.host_ip && **to == Ipv4Addr::LOCALHOST)
        .map(|(at, _)| *at);
    let mut args = DataplaneArgs {
        vm: Some(vm.to_owned()),
        labels: own
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect(),
        listen_qemu: url("--listen-qemu", &interfaces.qemu).into_iter().collect(),
        listen_vfkit: url("--listen-vfkit", &interfaces.vfkit).into_iter().collect(),
        listen_bess: url("--listen-bess", &interfaces.bess).into_iter().collect(),
        listen_vpnkit: url("--listen-vpnkit", &interfaces.vpnkit).into_iter().collect(),
        listen_stdio: interfaces.stdio.iter().map(|_| "accept".to_owned()).collect(),
        listen: config
            .listen
            .iter()
            .filter_map(|at| url("--listen", &Some(at.clone())))
            .collect(),
        mtu: Some(stack.mtu_bytes.to_string()),
        subnet: Some(stack.subnet.to_string()),
        gateway: Some(stack.gateway_ip.to_string()),
        gateway_mac: Some(stack.gateway_mac.to_string()),
        host_alias: Some(alias.map_or("none".to_owned(), |alias| alias.to_string())),
        static_leases: stack
            .dhcp_static_leases
            .iter()
            .map(|(ip, mac)| format!("{mac}={ip}"))
            .collect(),
        dns_search: stack.search_flags(),
        first_guest: Some(stack.device_ip.to_string()),
        nat: stack
            .nat
            .iter()
            .filter(|(at, _)| Some(**at) != alias)
            .map(|(at, to)| format!("{at}={to}"))
            .collect(),
        virtual_ips: stack
            .gateway_virtual_ips
            .iter()
            .filter(|at| Some(**at) != alias)
            .map(ToString::to_string)
            .collect(),
        vpnkit_macs: stack
            .vpnkit_uuid_macs
            .iter()
            .map(|(uuid, mac)| format!("{uuid}={mac}"))
            .collect(),
        ..DataplaneArgs::default()
    };
    name_apart(&mut args, vm);
    let mut forwards = Vec::new();
    for forward in &stack.forwards {
        let listens = match published(&forward.listen, resolve) {
            Ok(addresses) => addresses,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        let listens: Vec<SocketAddr> = listens
            .into_iter()
            .map(|address| SocketAddr::new(address, forward.listen.port))
            .collect();
        let protocol = if forward.is_udp { "udp" } else { "tcp" };
        let publish = listens
            .iter()
            .map(|at| format!("{at}:{}/{protocol}", forward.guest));
        args.publish.extend(publish);
        forwards.push(Opened {
            is_udp: forward.is_udp,
            local: forward.listen.to_string(),
            remote: forward.guest.to_string(),
            listens,
        });
    }
    let mut warnings = own.unheard.clone();
    let services = config.services.as_ref().and_then(|at| {
        let from = named(at, config.origins.get(at));
        let found = listen_at(at, &from, resolve);
        let found = found.map_err(|problem| problems.push(problem)).ok();
        if let Some(ListenAt::Tcp(address)) = &found
            && !address.ip().is_loopback()
        {
            warnings.push(format!(
                "{from} can be reached from other hosts, and asks nobody who they are; listen at 127.0.0.1 or a unix \
                 socket"
            ));
        }
        found
    });
    let mode = said(config.mode, &own.mode, "mode", &mut warnings);
    let treatment = Treatment {
        document: policy,
        rules: Vec::new(),
        mode,
        ec2_metadata_access: stack.ec2_metadata_access,
        warnings: Vec::new(),
    };
    let zones = stack.zone_settings();
    // As under the peer. Where a policy or a mode is in force, it decides what guests expose.
    args.guest_api = own.guest_api.as_ref().is_none_or(|given| given.value);
    if problems.is_empty() {
        Ok(Plan {
            settings: Settings {
                args,
                treatment,
                zones: Some(zones),
                ..Settings::default()
            },
            log_level: if stack.debug {
                config.log_level.max(LogLevel::Debug)
            } else {
                config.log_level
            },
            services,
            forwards,
            words,
            warnings,
        })
    } else {
        Err(problems)
    }
}

/// Gives each of several sockets a name of its own, so that nobody who comes at one has what is said of another's
/// guest. The VM's is the first's: of QEMU's, vfkit's, BESS's, vpnkit's, standard input, `-listen`. The others have
/// their kind behind it, and then their number without a dash: further guests of one socket have a dash before theirs.
fn name_apart(args: &mut DataplaneArgs, vm: &str) {
    let hypervisors = [
        ("qemu", &mut args.listen_qemu),
        ("vfkit", &mut args.listen_vfkit),
        ("bess", &mut args.listen_bess),
        ("vpnkit", &mut args.listen_vpnkit),
    ];
    let has_stdio = !args.listen_stdio.is_empty();
    let of_hypervisors: usize = hypervisors.iter().map(|(_, urls)| urls.len()).sum();
    if of_hypervisors + usize::from(has_stdio) + args.listen.len() < 2 {
        return;
    }
    let mut is_first = true;
    let mut next = |kind: &str, index: usize| {
        if std::mem::take(&mut is_first) {
            return vm.to_owned();
        }
        let suffix = match index {
            0 => format!("-{kind}"),
            _ => format!("-{kind}{}", index + 1),
        };
        // Names are ASCII.
        let room = NAME_CHARACTERS_MAX.saturating_sub(suffix.len());
        if vm.len() <= room {
            return format!("{vm}{suffix}");
        }
        // What is left of two names may be the same.
        let suffix = format!("-{:08x}{suffix}", fnv1a(vm.as_bytes()) as u32);
        let room = NAME_CHARACTERS_MAX.saturating_sub(suffix.len());
        vm.chars().take(room).chain(suffix.chars()).collect()
    };
    for (kind, urls) in hypervisors {
        for (index, url) in urls.iter_mut().enumerate() {
            let _ = write!(url, "?name={}", next(kind, index));
        }
    }
    // It has no URL; the others do not need the flag any more.
    if has_stdio {
        args.vm = Some(next("stdio", 0));
    }
    for (index, url) in args.listen.iter_mut().enumerate() {
        let _ = write!(url, "?name={}", next("listen", index));
    }
}

/// What the command line says, else what [`Own`] does. That the latter is not heard is told.
fn said<T: Copy + PartialEq + std::fmt::Display>(
    typed: Option<T>,
    own: &Option<crate::gvproxy::origin::Given<T>>,
    what: &str,
    warnings: &mut Vec<String>,
) -> Option<T> {
    match (typed, own) {
        (Some(typed), Some(own)) if typed != own.value => {
            warnings.push(format!(
                "{}: {what} {} is not used, as the command line or its file says {typed}",
                own.from, own.value
            ));
            Some(typed)
        }
        (Some(typed), _) => Some(typed),
        (None, own) => own.as_ref().map(|given| given.value),
    }
}

/// A socket, as whoever asks for it wrote it: the flag or key, and its value.
fn named(at: &Endpoint, from: Option<&Origin>) -> String {
    from.map_or_else(|| at.to_string(), |from| format!("{from} {at}"))
}

/// A URL of a guests' socket, as the dataplane reads it.
fn socket_url(at: &Endpoint, from: Option<&Origin>, resolve: Resolve<'_>) -> Result<String, String> {
    let from = named(at, from);
    let path = |scheme: &str, path: &std::path::Path| {
        let text = path.to_string_lossy();
        format!("{scheme}://{}", text.replace('%', "%25").replace('?', "%3F"))
    };
    Ok(match at {
        Endpoint::Unix(at) => path("unix", at),
        Endpoint::UnixGram(at) => path("unixgram", at),
        Endpoint::UnixPacket(at) => path("unixpacket", at),
        Endpoint::Tcp(to) => {
            let address = SocketAddr::new(resolve_first(to, &from, resolve)?, to.port);
            if !address.ip().is_loopback() {
                return Err(format!(
                    "{from} can be reached from other hosts, and whoever comes would be a guest; write \
                     tcp://127.0.0.1:{}, or unix:///PATH",
                    to.port
                ));
            }
            format!("tcp://{address}")
        }
        Endpoint::Vsock { .. } => at.to_string(),
    })
}

/// Where the front itself listens.
fn listen_at(at: &Endpoint, from: &str, resolve: Resolve<'_>) -> Result<ListenAt, String> {
    Ok(match at {
        Endpoint::Unix(path) => ListenAt::Unix(path.clone()),
        Endpoint::Tcp(to) => ListenAt::Tcp((resolve_first(to, from, resolve)?, to.port).into()),
        Endpoint::Vsock { cid, port } => ListenAt::Vsock {
            cid: *cid,
            port: *port,
        },
        Endpoint::UnixPacket(_) | Endpoint::UnixGram(_) => {
            // None of its schemes.
            return Err(format!("{from}: HTTP needs a stream (write unix:///PATH)"));
        }
    })
}

/// The addresses that a forward listens at: every one of the host where none is named, of both families.
fn published(at: &HostPort, resolve: Resolve<'_>) -> Result<Vec<IpAddr>, String> {
    if !at.host.is_empty() {
        let from = format!("stack.forwards {at}");
        return resolve_first(at, &from, resolve).map(|address| vec![address]);
    }
    let mut addresses = vec![IpAddr::from([0, 0, 0, 0])];
    addresses.extend(has_ipv6().then_some(IpAddr::from([0u16; 8])));
    Ok(addresses)
}

/// The address that a host and port mean; of IPv4 where there is one, as Go has it.
fn resolve_first(at: &HostPort, from: &str, resolve: Resolve<'_>) -> Result<IpAddr, String> {
    if at.host.is_empty() {
        return Ok(IpAddr::from([0, 0, 0, 0]));
    }
    let found = resolve(&at.host).map_err(|error| {
        format!(
            "{from}: {:?} cannot be looked up: {error} (write an address)",
            at.host
        )
    })?;
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first
        .copied()
        .ok_or_else(|| format!("{from}: {:?} has no address (write one)", at.host))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::path::Path;

    use vnet_proto::model::Mode;

    use super::*;
    use crate::gvproxy::config::{Host, PolicySource};
    use crate::gvproxy::flags::Flags;
    use crate::gvproxy::origin::{Given, Origin};
    use crate::gvproxy::yaml::FileConfig;
    use crate::launch::{ZoneRecordSettings, ZoneSettings, document, is_name};

    fn planned(line: &str, file: &str, own: &Own) -> Result<Plan, Vec<String>> {
        planned_as(line, file, own, "web")
    }

    fn planned_as(line: &str, file: &str, own: &Own, vm: &str) -> Result<Plan, Vec<String>> {
        let host = Host {
            search_domains: &["lan".parse().unwrap()],
            exists: &|_| Ok(false),
            is_no_directory: &|_| false,
        };
        let flags = Flags::parse(line.split_whitespace().map(OsString::from)).unwrap();
        let (file, _) = FileConfig::parse("f.yaml", file, true).unwrap();
        let (config, _) = Config::resolve(&flags, file, &host).unwrap();
        plan(&config, None, own, vm, &|name| match name {
            "localhost" => Ok(vec!["::1".parse().unwrap(), "127.0.0.1".parse().unwrap()]),
            other => other
                .parse()
                .map(|address| vec![address])
                .map_err(|_| io::ErrorKind::NotFound.into()),
        })
    }

    #[test]
    fn what_podman_types_becomes_flags() {
        let line = "-debug -mtu 1500 -ssh-port 4022 -listen-qemu unix:///run/a%20b%3F.sock -listen unix:///run/api.sock";

        let args = planned(line, "", &Own::default()).unwrap().settings.args;

        assert_eq!(args.listen_qemu, ["unix:///run/a b%3F.sock?name=web"]);
        assert_eq!(args.listen, ["unix:///run/api.sock?name=web-listen"]);
        assert_eq!(args.publish, ["127.0.0.1:4022:192.168.127.2:22/tcp"]);
        assert_eq!(args.static_leases, ["5a:94:ef:e4:0c:ee=192.168.127.2"]);
        assert_eq!(args.dns_search, ["host"]);
        assert_eq!(args.first_guest.as_deref(), Some("192.168.127.2"));
        assert_eq!(args.host_alias.as_deref(), Some("192.168.127.254"));
        assert!(
            args.nat.is_empty() && args.virtual_ips.is_empty(),
            "both are the host alias's"
        );
        assert_eq!(
            args.vpnkit_macs,
            ["c3d68012-0208-11ea-9fd7-f2189899ab08=5a:94:ef:e4:0c:ee"]
        );
        assert_eq!(args.subnet.as_deref(), Some("192.168.127.0/24"));
        assert_eq!(args.vm.as_deref(), Some("web"));
    }

    #[test]
    fn what_other_hosts_could_reach_is_refused_for_guests_and_a_warning_for_the_services() {
        let own = Own::default();
        let open = "can be reached from other hosts, and";
        for at in [
            "tcp://0.0.0.0:80",
            "tcp://:80",
            "tcp://192.0.2.1:80",
            "tcp://[::]:80",
        ] {
            for flag in ["-listen", "-listen-qemu", "-listen-vpnkit"] {
                assert_eq!(
                    planned(&format!("{flag} {at}"), "", &own).unwrap_err(),
                    [format!(
                        "{flag} {at} {open} whoever comes would be a guest; write tcp://127.0.0.1:80, or unix:///PATH"
                    )]
                );
            }
            assert_eq!(
                planned(&format!("-services {at}"), "", &own).unwrap().warnings,
                [format!(
                    "-services {at} {open} asks nobody who they are; listen at 127.0.0.1 or a unix socket"
                )]
            );
        }
        for line in ["-services tcp://localhost:80", "-listen tcp://[::1]:80"] {
            assert_eq!(planned(line, "", &own).unwrap().warnings, [""; 0], "{line}");
        }
        // What does not resolve is told as that, and as nothing else.
        for flag in ["-listen", "-services"] {
            assert_eq!(
                planned(&format!("{flag} tcp://nosuch:1"), "", &own).unwrap_err(),
                [format!(
                    "{flag} tcp://nosuch:1: \"nosuch\" cannot be looked up: entity not found (write an address)"
                )]
            );
        }
        let file = "interfaces: {qemu: \"tcp://:80\"}";
        let refused = planned("-config f.yaml", file, &own).unwrap_err();
        assert!(
            refused[0].starts_with("f.yaml:1:20: interfaces.qemu tcp://:80 can be"),
            "{refused:?}"
        );
    }

    #[test]
    fn what_the_dataplane_says_of_a_socket_is_told_as_it_was_asked_for() {
        let own = Own::default();
        let file =
            "interfaces: {vfkit: \"unixgram:///run/v.sock\", stdio: x}\nlisten: [\"tcp://localhost:80\"]\n";
        let words = planned("-config f.yaml", file, &own).unwrap().words;
        let why = "cannot be opened: Permission denied (os error 13)";
        for (said, told) in [
            (
                "--listen-vfkit unixgram:///run/v.sock",
                "f.yaml:1:21: interfaces.vfkit unixgram:///run/v.sock",
            ),
            (
                "--listen tcp://127.0.0.1:80",
                "f.yaml:2:10: listen[0] tcp://localhost:80",
            ),
            ("--listen-stdio:", "f.yaml:1:54: interfaces.stdio:"),
        ] {
            assert_eq!(words.of(&format!("{said} {why}")), format!("{told} {why}"));
        }
        let line =
            "-listen-bess unixpacket:///b.sock -listen vsock://:1024 -listen-vfkit unixgram:///run/v%25.sock";
        let plan = planned(line, "", &own).unwrap();
        for (said, told) in [
            (
                "--listen-bess unixpacket:///b.sock",
                "-listen-bess unixpacket:///b.sock",
            ),
            ("--listen vsock://:1024", "-listen vsock://:1024"),
            (
                "--listen-vfkit unixgram:///run/v%.sock",
                "-listen-vfkit unixgram:///run/v%.sock",
            ),
        ] {
            assert_eq!(plan.words.of(&format!("{said} {why}")), format!("{told} {why}"));
        }
        // As it is passed, with the name that it is given.
        let url = &plan.settings.args.listen_vfkit[0];
        assert_eq!(
            plan.words.of(&format!("--listen-vfkit {url}: the path")),
            "-listen-vfkit unixgram:///run/v%.sock: the path"
        );
    }

    #[test]
    fn forwards_of_the_file_listen_where_it_says() {
        let file = "stack:\n  forwards:\n    \"localhost:80\": 192.168.127.2:8080\n    \"udp:[::1]:53\": 192.168.127.3:53\n    \":81\": 192.168.127.2:81\n";

        let args = planned("-config f.yaml", file, &Own::default())
            .unwrap()
            .settings
            .args;

        let mut expected = vec![
            "127.0.0.1:80:192.168.127.2:8080/tcp",
            "[::1]:53:192.168.127.3:53/udp",
            "0.0.0.0:81:192.168.127.2:81/tcp",
        ];
        expected.extend(has_ipv6().then_some("[::]:81:192.168.127.2:81/tcp"));
        assert_eq!(args.publish, expected);
        let problem = planned(
            "-config f.yaml",
            "stack: {forwards: {\"nowhere:80\": 192.168.127.2:80}}",
            &Own::default(),
        );
        assert_eq!(
            problem.unwrap_err(),
            [
                "stack.forwards nowhere:80: \"nowhere\" cannot be looked up: entity not found (write an address)"
            ]
        );
    }

    /// Every key that the network, its sockets and its guests' treatment have.
    const WHOLE: &str = r#"
listen: ["unix:///run/api.sock", "tcp://localhost:8080", "vsock://:1024"]
services: unix:///run/services.sock
log-level: warning
interfaces:
  qemu: tcp://127.0.0.1:9000
  vfkit: unixgram:///run/vfkit.sock
  stdio: accept
pid-file: /run/gv.pid
log-file: /run/gv.log
notification: /run/notices.sock
stack:
  debug: true
  capture-file: /run/all.pcapng
  mtu: 4000
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
        - {regexp: "^web-[0-9]+$", ip: "fd00::7"}
        - {name: up}
    - name: .
      records: [{name: example.com}]
  dnsSearchDomains: [lab.internal, host]
  forwards:
    ":81": 10.7.0.9:80
    "localhost:82": "[fd00::9]:80"
    "udp:127.0.0.1:53": 10.7.0.10:53
  nat:
    10.7.0.253: 127.0.0.1
    10.7.1.1: 127.0.0.2
    198.51.100.9: 203.0.113.10
  gatewayVirtualIPs: [10.7.0.253, 10.7.1.1]
  dhcpStaticLeases:
    10.7.0.10: 5a:94:ef:e4:0c:10
    10.7.0.9: 5A94.EFE4.0C09
  vpnKitUUIDMacAddresses:
    C3D68012-0208-11EA-9FD7-F2189899AB08: 5a:94:ef:e4:0c:09
  ec2MetadataAccess: true
  networkPolicy:
    defaultAction: deny
    rules: [{action: allow, cidr: 203.0.113.10/32, ports: [443], protocol: tcp}]
"#;

    #[test]
    fn a_whole_file_becomes_what_it_says() {
        let host = Host {
            search_domains: &["lan".parse().unwrap()],
            exists: &|_| Ok(false),
            is_no_directory: &|_| false,
        };
        let flags = Flags::parse(["-config", "f.yaml"].map(OsString::from)).unwrap();
        let (file, _) = FileConfig::parse("f.yaml", WHOLE, true).unwrap();
        let (config, warnings) = Config::resolve(&flags, file, &host).unwrap();
        assert_eq!(
            warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
            Vec::<String>::new()
        );
        let Some(PolicySource::Inline { file, text }) = &config.policy else {
            panic!("{:?}", config.policy);
        };
        let policy = document(file.to_string(), text.clone(), Path::new("")).unwrap();

        let resolve: Resolve<'_> = &|name| match name {
            "localhost" => Ok(vec![[127, 0, 0, 1].into()]),
            other => Ok(vec![other.parse().unwrap()]),
        };
        let plan = plan(&config, Some(policy.clone()), &Own::default(), "web", resolve).unwrap();

        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let some = |text: &str| Some(text.to_owned());
        let publish = [
            vec!["0.0.0.0:81:10.7.0.9:80/tcp"],
            has_ipv6()
                .then_some("[::]:81:10.7.0.9:80/tcp")
                .into_iter()
                .collect(),
            vec!["127.0.0.1:82:[fd00::9]:80/tcp", "127.0.0.1:53:10.7.0.10:53/udp"],
        ]
        .concat();
        let expected = DataplaneArgs {
            // Standard input's, which has no URL to say it.
            vm: some("web-stdio"),
            listen_qemu: texts(&["tcp://127.0.0.1:9000?name=web"]),
            listen_vfkit: texts(&["unixgram:///run/vfkit.sock?name=web-vfkit"]),
            listen_stdio: texts(&["accept"]),
            listen: texts(&[
                "unix:///run/api.sock?name=web-listen",
                "tcp://127.0.0.1:8080?name=web-listen2",
                "vsock://:1024?name=web-listen3",
            ]),
            mtu: some("4000"),
            subnet: some("10.7.0.0/16"),
            gateway: some("10.7.0.254"),
            gateway_mac: some("5a:94:ef:e4:0c:01"),
            // Of these destinations one is the host's loopback, and so its alias.
            host_alias: some("10.7.0.253"),
            nat: texts(&["10.7.1.1=127.0.0.2", "198.51.100.9=203.0.113.10"]),
            virtual_ips: texts(&["10.7.1.1"]),
            first_guest: some("10.7.0.9"),
            static_leases: texts(&["5a:94:ef:e4:0c:09=10.7.0.9", "5a:94:ef:e4:0c:10=10.7.0.10"]),
            vpnkit_macs: texts(&["c3d68012-0208-11ea-9fd7-f2189899ab08=5a:94:ef:e4:0c:09"]),
            // With their last dots, so that the second is none of the dataplane's words.
            dns_search: texts(&["lab.internal.", "host."]),
            publish: texts(&publish),
            guest_api: true,
            ..DataplaneArgs::default()
        };
        assert_eq!(format!("{:#?}", plan.settings.args), format!("{expected:#?}"));
        assert_eq!(
            plan.settings.treatment,
            Treatment {
                document: Some(policy),
                ec2_metadata_access: true,
                ..Treatment::default()
            }
        );
        let record = |name: &str, regexp: &str, address: &str| ZoneRecordSettings {
            name: name.to_owned(),
            regexp: regexp.to_owned(),
            address: address.to_owned(),
        };
        assert_eq!(
            plan.settings.zones.unwrap(),
            [
                ZoneSettings {
                    name: "lab.internal".to_owned(),
                    records: vec![
                        record("db", "", "10.7.0.10"),
                        record("", "^web-[0-9]+$", "fd00::7"),
                        record("up", "", ""),
                    ],
                    default_address: "10.7.0.253".to_owned(),
                },
                ZoneSettings {
                    name: ".".to_owned(),
                    records: vec![record("example.com", "", "")],
                    default_address: String::new(),
                },
            ]
        );
        // `stack.debug` asks for more than the file's level.
        assert_eq!(plan.log_level, LogLevel::Debug);
        assert_eq!(plan.services, Some(ListenAt::Unix("/run/services.sock".into())));
        let forwards: Vec<_> = plan
            .forwards
            .iter()
            .map(|f| (f.is_udp, &*f.local, &*f.remote))
            .collect();
        assert_eq!(
            forwards,
            [
                (false, ":81", "10.7.0.9:80"),
                (false, "localhost:82", "[fd00::9]:80"),
                (true, "127.0.0.1:53", "10.7.0.10:53"),
            ]
        );
        assert_eq!(plan.warnings, Vec::<String>::new());
        // What the front itself does is not in the plan.
        assert_eq!(
            config.stack.capture_file.as_ref().map(|given| &*given.value),
            Some(Path::new("/run/all.pcapng"))
        );
        assert_eq!(
            config.notification.as_deref(),
            Some(Path::new("/run/notices.sock"))
        );
    }

    #[test]
    fn each_socket_is_a_flag_of_its_own() {
        // The peer's file may name one of these three.
        let listens = |interface: &str| {
            let file = format!("interfaces: {{{interface}, vfkit: \"unixgram:///v\"}}");
            let args = planned("-config f.yaml", &file, &Own::default())
                .unwrap()
                .settings
                .args;
            [
                args.listen_qemu,
                args.listen_vfkit,
                args.listen_bess,
                args.listen_vpnkit,
                args.listen_stdio,
            ]
            .map(|flags| flags.join(" "))
        };
        let (first, other) = ("unixgram:///v?name=web", "unixgram:///v?name=web-vfkit");
        assert_eq!(
            listens(r#"qemu: "unix:///q""#),
            ["unix:///q?name=web", other, "", "", ""]
        );
        assert_eq!(
            listens(r#"bess: "unixpacket:///b""#),
            ["", first, "unixpacket:///b?name=web-bess", "", ""]
        );
        assert_eq!(
            listens(r#"vpnkit: "unix:///k""#),
            ["", first, "", "unix:///k?name=web-vpnkit", ""]
        );
        assert_eq!(listens("stdio: accept"), ["", first, "", "", "accept"]);
    }

    /// What sockets are called by the dataplane, in the order of its flags: VMs' names are unlike those of all further
    /// guests, NAME-2 to NAME-256, of any of them.
    #[test]
    fn each_of_several_sockets_has_a_name_of_its_own() {
        let names = |line: &str, vm: &str| {
            let args = planned_as(line, "", &Own::default(), vm).unwrap().settings.args;
            let urls = [
                &args.listen_qemu,
                &args.listen_vfkit,
                &args.listen_bess,
                &args.listen_vpnkit,
            ];
            let urls = urls.into_iter().chain([&args.listen]).flatten();
            let named = urls.map(|url| url.split_once("?name=").map(|(_, name)| name.to_owned()));
            (
                args.vm.unwrap(),
                named.map(Option::unwrap_or_default).collect::<Vec<_>>(),
            )
        };
        let expected = |vm: &str, urls: &[&str]| {
            let urls: Vec<_> = urls.iter().map(ToString::to_string).collect();
            (vm.to_owned(), urls)
        };
        let (qemu, two) = ("-listen-qemu unix:///q", "-listen unix:///a -listen unix:///b");
        assert_eq!(names(qemu, "web"), expected("web", &[""]));
        assert_eq!(names("-listen unix:///a", "web"), expected("web", &[""]));
        assert_eq!(names("-listen-stdio accept", "web"), expected("web", &[]));
        assert_eq!(names(two, "web"), expected("web", &["web", "web-listen2"]));
        assert_eq!(
            names(&format!("{qemu} {two}"), "web"),
            expected("web", &["web", "web-listen", "web-listen2"])
        );
        let line = format!("-listen-stdio accept {two}");
        assert_eq!(
            names(&line, "web"),
            expected("web", &["web-listen", "web-listen2"])
        );

        let longest = "n".repeat(63);
        let (_, long) = names(&format!("{qemu} {two}"), &longest);
        assert_eq!(long[0], longest);
        assert_eq!(long[2], format!("{}-233bc6a9-listen2", "n".repeat(46)));
        assert!(long.iter().all(|name| is_name(name)), "{long:?}");
        let other = format!("{}m", "n".repeat(62));
        let (_, of_other) = names(&format!("{qemu} {two}"), &other);
        assert!(long.iter().all(|name| !of_other.contains(name)), "{of_other:?}");
        let fits = "n".repeat(55);
        let (_, names) = names(&format!("{qemu} {two}"), &fits);
        assert_eq!(names[2], format!("{fits}-listen2"));
    }

    #[test]
    fn a_file_that_closes_everything_or_all_but_names_is_a_mode_or_a_policy() {
        let mode = |file: &str| {
            let plan = planned("-config f.yaml -listen-stdio=accept", file, &Own::default()).unwrap();
            plan.settings.treatment.mode
        };
        assert_eq!(mode("stack: {blockAllOutbound: true}"), Some(Mode::Block));
        assert_eq!(mode("stack: {blockAllOutbound: false}"), None);
        assert_eq!(mode("stack: {ec2MetadataAccess: true}"), None);
    }

    #[test]
    fn a_host_that_nat_leads_elsewhere_has_no_alias() {
        let file = "stack: {nat: {192.168.127.254: 127.0.0.2}}";
        let args = planned("-config f.yaml -listen-stdio=accept", file, &Own::default())
            .unwrap()
            .settings
            .args;
        assert_eq!(args.host_alias.as_deref(), Some("none"));
        assert_eq!(args.nat, ["192.168.127.254=127.0.0.2"]);
        assert_eq!(args.virtual_ips, ["192.168.127.254"]);
    }

    #[test]
    fn guests_are_served_under_a_policy_too_unless_ones_own_file_says_otherwise() {
        let off = Own {
            guest_api: Some(Given {
                value: false,
                from: Origin::Variable("VNET_GUEST_API"),
            }),
            ..Own::default()
        };
        for (line, own, is_served) in [
            ("", &Own::default(), true),
            ("-secure-mode", &Own::default(), true),
            ("", &off, false),
            ("-secure-mode", &off, false),
        ] {
            assert_eq!(
                planned(line, "", own).unwrap().settings.args.guest_api,
                is_served,
                "{line}"
            );
        }
    }

    #[test]
    fn the_command_line_has_the_say_over_ones_own_file() {
        let own = Own {
            mode: Some(Given {
                value: Mode::Observe,
                from: Origin::Variable("VNET_MODE"),
            }),
            labels: [("team".to_owned(), "a".to_owned())].into(),
            ..Own::default()
        };

        let alone = planned("", "", &own).unwrap();
        let both = planned("-secure-mode", "", &own).unwrap();

        assert_eq!(alone.settings.treatment.mode, Some(Mode::Observe));
        assert_eq!(alone.settings.args.labels, ["team=a"]);
        assert_eq!(both.settings.treatment.mode, Some(Mode::Ask));
        assert_eq!(
            both.warnings,
            ["VNET_MODE: mode observe is not used, as the command line or its file says ask"]
        );
    }
}
