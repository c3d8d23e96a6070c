//! The golden table: arguments and a file in, the resolved configuration out, in the file's own shape.

mod any;
mod golden;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::*;
use crate::gvproxy::yaml::FileConfig;

/// What `-config` names in these tests.
const FILE: &str = "c.yaml";

/// A host on which only these files are.
struct Files(Vec<PathBuf>);

impl Files {
    fn resolve(
        &self,
        arguments: &[String],
        text: &str,
        search: &[Name],
    ) -> Result<(Config, Vec<String>), Vec<String>> {
        let flags =
            Flags::parse(arguments.iter().map(Into::into)).map_err(|error| vec![error.to_string()])?;
        let lines = |findings: Vec<crate::gvproxy::origin::Finding>| -> Vec<String> {
            findings.iter().map(ToString::to_string).collect()
        };
        let (file, findings) = FileConfig::parse(FILE, text, flags.strict).map_err(lines)?;
        let host = Host {
            search_domains: search,
            exists: &|path: &Path| Ok(self.0.iter().any(|file| file == path)),
            is_no_directory: &|path: &Path| path.starts_with("/gone"),
        };
        let (config, warnings) = Config::resolve(&flags, file, &host).map_err(|problems| {
            problems
                .to_string()
                .lines()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })?;
        let warnings = warnings.iter().map(ToString::to_string);
        Ok((config, lines(findings).into_iter().chain(warnings).collect()))
    }
}

/// A configuration in the shape of a file that says it whole. What is empty is left out. Every field is here: one that
/// is added does not compile until it is.
fn shown(config: &Config) -> Value {
    let Config {
        listen,
        // Each by the place that is shown.
        origins: _,
        services,
        log_level,
        stack,
        interfaces,
        forwards,
        pid_file,
        log_file,
        notification,
        mode,
        policy,
    } = config;
    let path = |path: Option<&PathBuf>| path.map(|path| path.display().to_string());
    let file = |given: &Option<Given<PathBuf>>| path(given.as_ref().map(|given| &given.value));
    let url = |endpoint: &Option<Endpoint>| endpoint.as_ref().map(ToString::to_string);
    let Interfaces {
        vpnkit,
        qemu,
        bess,
        stdio,
        vfkit,
    } = interfaces;
    let forward = |forward: &SshForward| {
        let SshForward {
            socket,
            dest,
            user,
            identity,
        } = forward;
        json!({"socket": socket, "dest": dest, "user": user, "identity": identity})
    };
    said([
        ("listen", json!(texts(listen))),
        ("services", json!(url(services))),
        ("log-level", json!(log_level.to_string())),
        ("stack", shown_stack(stack)),
        (
            "interfaces",
            said([
                ("vpnkit", json!(url(vpnkit))),
                ("qemu", json!(url(qemu))),
                ("bess", json!(url(bess))),
                ("stdio", json!(stdio.as_ref().map(|_| "accept"))),
                ("vfkit", json!(url(vfkit))),
            ]),
        ),
        (
            "forwards",
            json!(forwards.iter().map(forward).collect::<Vec<_>>()),
        ),
        ("pid-file", json!(file(pid_file))),
        ("log-file", json!(file(log_file))),
        ("notification", json!(path(notification.as_ref()))),
        ("mode", json!(mode.map(|mode| mode.to_string()))),
        (
            "policy",
            match policy {
                None => Value::Null,
                Some(PolicySource::File(path)) => json!({"path": path}),
                Some(PolicySource::Inline { file, text }) => json!({"file": &**file, "text": text}),
            },
        ),
    ])
}

fn shown_stack(stack: &Stack) -> Value {
    let Stack {
        debug,
        capture_file,
        mtu_bytes,
        subnet,
        gateway_ip,
        device_ip,
        host_ip,
        gateway_mac,
        dns,
        dns_search_domains,
        // Where they are from; `gvproxy::dns` has tests of it.
        dns_search_follows_host: _,
        forwards,
        nat,
        gateway_virtual_ips,
        dhcp_static_leases,
        vpnkit_uuid_macs,
        ec2_metadata_access,
    } = stack;
    let record = |record: &Record| {
        let Record { name, regexp, ip } = record;
        said([
            ("name", json!(name.as_ref().map(Name::as_str))),
            ("regexp", json!(regexp)),
            ("ip", json!(ip)),
        ])
    };
    let zone = |zone: &Zone| {
        let Zone {
            name,
            records,
            default_ip,
        } = zone;
        said([
            (
                "name",
                json!(name.as_ref().map_or(".".to_owned(), |name| format!("{name}."))),
            ),
            ("records", json!(records.iter().map(record).collect::<Vec<_>>())),
            ("defaultIP", json!(default_ip)),
        ])
    };
    let forward = |forward: &Forward| {
        let Forward {
            is_udp,
            listen,
            guest,
        } = forward;
        let protocol = if *is_udp { "udp:" } else { "" };
        (format!("{protocol}{listen}"), guest.to_string())
    };
    said([
        ("debug", json!(debug)),
        (
            "capture-file",
            json!(capture_file.as_ref().map(|given| &given.value)),
        ),
        ("mtu", json!(mtu_bytes)),
        ("subnet", json!(subnet.to_string())),
        ("gatewayIP", json!(gateway_ip)),
        ("deviceIP", json!(device_ip)),
        ("hostIP", json!(host_ip)),
        ("gatewayMacAddress", json!(gateway_mac.to_string())),
        ("dns", json!(dns.iter().map(zone).collect::<Vec<_>>())),
        ("dnsSearchDomains", json!(texts(dns_search_domains))),
        (
            "forwards",
            json!(forwards.iter().map(forward).collect::<BTreeMap<_, _>>()),
        ),
        ("nat", json!(nat)),
        ("gatewayVirtualIPs", json!(gateway_virtual_ips)),
        ("dhcpStaticLeases", macs(dhcp_static_leases)),
        ("vpnKitUUIDMacAddresses", macs(vpnkit_uuid_macs)),
        ("ec2MetadataAccess", json!(ec2_metadata_access)),
    ])
}

fn macs<K: ToString>(map: &BTreeMap<K, Mac>) -> Value {
    map.iter()
        .map(|(key, mac)| (key.to_string(), json!(mac.to_string())))
        .collect()
}

fn texts<T: ToString>(list: &[T]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn said<const N: usize>(entries: [(&str, Value); N]) -> Value {
    let is_said = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    };
    let said = entries.into_iter().filter(|(_, value)| is_said(value));
    Value::Object(
        said.map(|(key, value)| (key.to_owned(), value))
            .collect::<Map<_, _>>(),
    )
}

#[test]
fn what_is_told_is_bounded_and_a_large_file_is_read_at_once() {
    let arguments = ["-config", FILE].map(str::to_owned);
    let lines = |line: &dyn Fn(usize) -> String| (0..3_000).map(line).collect::<String>();
    let zones = format!(
        "stack:\n  dns:\n{}",
        lines(&|n| format!("    - name: z{n}.example\n"))
    );
    let same = format!(
        "stack:\n  dns:\n{}",
        lines(&|_| "    - name: z.example\n".to_owned())
    );
    let wrong = format!("stack:\n  nat:\n{}", lines(&|n| format!("    a{n}: 127.0.0.1\n")));

    let too_many = Files(vec![]).resolve(&arguments, &zones, &[]).unwrap_err();
    let (_, warnings) = Files(vec![]).resolve(&arguments, &same, &[]).unwrap();
    let problems = Files(vec![]).resolve(&arguments, &wrong, &[]).unwrap_err();

    assert_eq!(too_many, ["stack.dns has 3000 zones (at most 256)"]);
    // One of them is that no guest can attach.
    assert_eq!(warnings.len(), TOLD_MAX + 1);
    assert_eq!(warnings[TOLD_MAX], "2900 more warnings are not shown");
    assert_eq!(problems.len(), TOLD_MAX + 1);
    assert_eq!(problems[TOLD_MAX], "2900 more problems are not shown");
}

#[test]
fn a_directory_that_is_not_there_is_named_with_what_makes_it() {
    let file = "interfaces: {vfkit: \"unixgram:///gone/v.sock\"}\nlog-file: /gone/c/gv.log\n";
    let words = "-pid-file /gone/a/gv.pid -services unix:///gone/s.sock -listen unix:///gone/b/l.sock";
    let arguments: Vec<String> = ["-config", FILE]
        .into_iter()
        .chain(words.split(' '))
        .map(str::to_owned)
        .collect();

    let problems = Files(vec![]).resolve(&arguments, file, &[]).unwrap_err();

    let told = |from: &str, path: &str, directory: &str| {
        format!("{from}: {path} cannot be made, as its directory is not there; run: mkdir -p {directory}")
    };
    assert_eq!(
        problems,
        [
            told("-listen", "/gone/b/l.sock", "/gone/b"),
            told("-services", "/gone/s.sock", "/gone"),
            told(&format!("{FILE}:1:21: interfaces.vfkit"), "/gone/v.sock", "/gone"),
            told("-pid-file", "/gone/a/gv.pid", "/gone/a"),
            told(&format!("{FILE}:2:11: log-file"), "/gone/c/gv.log", "/gone/c"),
        ]
    );
    // It can be typed as it is told.
    let arguments = ["-pid-file", "/gone/it's a b/gv.pid", "-listen-stdio=accept"].map(str::to_owned);
    let problems = Files(vec![]).resolve(&arguments, "", &[]).unwrap_err();
    let directory = "\"/gone/it's a b\"";
    assert_eq!(problems, [told("-pid-file", "/gone/it's a b/gv.pid", directory)]);
    // Here is a directory.
    let arguments = ["-pid-file", "gv.pid", "-listen-stdio=accept"].map(str::to_owned);
    assert!(Files(vec![]).resolve(&arguments, "", &[]).is_ok());
}

#[test]
fn a_socket_over_ssh_is_known_by_what_asks_for_it_and_has_its_place_alone() {
    let words = |sock: &str, listen: &str| -> Vec<String> {
        let line = format!(
            "-forward-sock {sock} -forward-dest /d -forward-user u -forward-identity /k -listen unix://{listen}"
        );
        line.split(' ').map(str::to_owned).collect()
    };
    let files = || Files(vec!["/k".into()]);

    let (config, _) = files().resolve(&words("/run/f", "/run/l"), "", &[]).unwrap();
    let problems = files().resolve(&words("/run/f", "/run/f"), "", &[]).unwrap_err();

    let origin = |path: &str| config.origins.get(&Endpoint::Unix(path.into()));
    assert_eq!(origin("/run/f"), Some(&Origin::Flag("forward-sock")));
    assert_eq!(origin("/run/l"), Some(&Origin::Flag("listen")));
    assert_eq!(
        problems,
        ["-forward-sock unix:///run/f: -listen listens there too; give each a place of its own"]
    );
}

#[test]
fn forwards_are_taken_up_to_their_limit() {
    use crate::launch::FORWARDS_MAX;

    let arguments = ["-config", FILE, "-listen-stdio=accept"].map(str::to_owned);
    let forwards = |n: usize| -> String {
        let lines = (0..n).map(|n| format!("    \":{}\": 192.168.127.2:80\n", 1024 + n));
        format!("stack:\n  forwards:\n{}", lines.collect::<String>())
    };

    let (config, _) = Files(vec![])
        .resolve(&arguments, &forwards(FORWARDS_MAX), &[])
        .unwrap();
    let problems = Files(vec![])
        .resolve(&arguments, &forwards(FORWARDS_MAX + 1), &[])
        .unwrap_err();

    assert_eq!(config.stack.forwards.len(), FORWARDS_MAX);
    assert_eq!(problems, ["stack.forwards has 1025 entries (at most 1024)"]);
}
