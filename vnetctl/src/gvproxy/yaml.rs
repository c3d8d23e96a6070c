//! The file of `-config`: gvproxy's schema, with what vnet adds to it.
//!
//! Owns the keys and their kinds; whether the values make sense is [`config`](super::config)'s. An unknown key is told
//! with the nearest known one, and refused under `-strict`; gvproxy passes over it in silence.

mod inline;
mod reader;
#[cfg(test)]
mod tests;
mod tree;

use super::origin::{Finding, Given, Origin};

pub(super) use reader::{Fields, Reader};
pub(super) use tree::{Node, Value, load as load_tree};

/// Bytes that the file may have.
pub const FILE_BYTES_MAX: usize = 4 << 20;

/// What the file says. A value that is empty is one that is not given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileConfig {
    /// `listen`.
    pub listen: Vec<Given<String>>,
    /// `log-level`.
    pub log_level: Option<Given<String>>,
    /// `stack`.
    pub stack: StackKeys,
    /// `interfaces`.
    pub interfaces: InterfaceKeys,
    /// `forwards`: sockets over SSH.
    pub forwards: Vec<ForwardKeys>,
    /// `pid-file`.
    pub pid_file: Option<Given<String>>,
    /// `log-file`.
    pub log_file: Option<Given<String>>,
    /// `services`.
    pub services: Option<Given<String>>,
    /// `notification`.
    pub notification: Option<Given<String>>,
    /// `ec2-metadata-access`.
    pub ec2_metadata_access: bool,
}

/// `stack`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StackKeys {
    /// `debug`.
    pub debug: bool,
    /// `capture-file`.
    pub capture_file: Option<Given<String>>,
    /// `mtu`, in bytes.
    pub mtu: Option<Given<i64>>,
    /// `subnet`.
    pub subnet: Option<Given<String>>,
    /// `gatewayIP`.
    pub gateway_ip: Option<Given<String>>,
    /// `deviceIP`.
    pub device_ip: Option<Given<String>>,
    /// `hostIP`.
    pub host_ip: Option<Given<String>>,
    /// `gatewayMacAddress`.
    pub gateway_mac: Option<Given<String>>,
    /// `dns`.
    pub dns: Vec<ZoneKeys>,
    /// `dnsSearchDomains`.
    pub dns_search_domains: Vec<Given<String>>,
    /// `forwards`: from where on the host, to where.
    pub forwards: Vec<(String, Given<String>)>,
    /// `nat`: from which address, to which of the host.
    pub nat: Vec<(String, Given<String>)>,
    /// `gatewayVirtualIPs`.
    pub gateway_virtual_ips: Vec<Given<String>>,
    /// `dhcpStaticLeases`: which address, for which MAC address.
    pub dhcp_static_leases: Vec<(String, Given<String>)>,
    /// `vpnKitUUIDMacAddresses`: which VM's UUID, which MAC address.
    pub vpnkit_uuid_macs: Vec<(String, Given<String>)>,
    /// `ec2MetadataAccess`.
    pub ec2_metadata_access: bool,
    /// `networkPolicy`: a policy document, at the lines and columns that it has in the file.
    pub network_policy: Option<Given<String>>,
    /// `blockAllOutbound`, where it is true.
    pub block_all_outbound: Option<Origin>,
    /// `outboundAllow`: a policy document of it, at the lines that its expressions have in the file.
    pub outbound_allow: Option<Given<String>>,
}

/// An entry of `stack.dns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneKeys {
    /// Where the zone stands.
    pub from: Origin,
    /// `name`.
    pub name: Option<Given<String>>,
    /// `records`.
    pub records: Vec<RecordKeys>,
    /// `defaultIP`.
    pub default_ip: Option<Given<String>>,
}

/// An entry of a zone's `records`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordKeys {
    /// Where the record stands.
    pub from: Origin,
    /// `name`.
    pub name: Option<Given<String>>,
    /// `ip`; without, the name is looked up upstream.
    pub ip: Option<Given<String>>,
    /// `regexp`.
    pub regexp: Option<Given<String>>,
}

/// `interfaces`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceKeys {
    /// `vpnkit`.
    pub vpnkit: Option<Given<String>>,
    /// `qemu`.
    pub qemu: Option<Given<String>>,
    /// `bess`.
    pub bess: Option<Given<String>>,
    /// `stdio`.
    pub stdio: Option<Given<String>>,
    /// `vfkit`.
    pub vfkit: Option<Given<String>>,
}

/// An entry of `forwards`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardKeys {
    /// Where the forward stands.
    pub from: Origin,
    /// `socket`.
    pub socket: Option<Given<String>>,
    /// `dest`.
    pub dest: Option<Given<String>>,
    /// `user`.
    pub user: Option<Given<String>>,
    /// `identity`.
    pub identity: Option<Given<String>>,
}

impl FileConfig {
    /// Reads the file's text, and gives what is to be warned of. `file` is its path, for messages; with `strict`, an
    /// unknown key is an error. A file of nothing is a configuration of nothing but defaults.
    ///
    /// # Errors
    /// Every value of the wrong kind, every key that stands twice and, with `strict`, every unknown one, in order of
    /// position; or the first thing that makes it no YAML.
    pub fn parse(file: &str, text: &str, strict: bool) -> Result<(Self, Vec<Finding>), Vec<Finding>> {
        let mut reader = Reader::new(file, strict);
        if text.len() > FILE_BYTES_MAX {
            let found = text.len();
            let problem = format!("the file is {found} bytes long (at most {FILE_BYTES_MAX})");
            reader.problem_at(1, 1, problem);
            return reader.end(Self::default());
        }
        match load_tree(text) {
            Ok(root) => {
                let config = read(&mut reader, &root, text);
                reader.end(config)
            }
            Err(problem) => {
                reader.problem_at(problem.place.line, problem.place.column, problem.text);
                reader.end(Self::default())
            }
        }
    }
}

/// The keys at the top.
pub const TOP_KEYS: [&str; 10] = [
    "listen",
    "log-level",
    "stack",
    "interfaces",
    "forwards",
    "pid-file",
    "log-file",
    "services",
    "ec2-metadata-access",
    "notification",
];

/// The keys of `stack`.
pub const STACK_KEYS: [&str; 19] = [
    "debug",
    "capture-file",
    "mtu",
    "subnet",
    "gatewayIP",
    "deviceIP",
    "hostIP",
    "gatewayMacAddress",
    "dns",
    "dnsSearchDomains",
    "forwards",
    "nat",
    "gatewayVirtualIPs",
    "dhcpStaticLeases",
    "vpnKitUUIDMacAddresses",
    "ec2MetadataAccess",
    "networkPolicy",
    "blockAllOutbound",
    "outboundAllow",
];

const ZONE_KEYS: [&str; 3] = ["name", "records", "defaultIP"];
const RECORD_KEYS: [&str; 3] = ["name", "ip", "regexp"];
const INTERFACE_KEYS: [&str; 5] = ["vpnkit", "qemu", "bess", "stdio", "vfkit"];
const FORWARD_KEYS: [&str; 4] = ["socket", "dest", "user", "identity"];

fn read(reader: &mut Reader, root: &Node, document: &str) -> FileConfig {
    let mut fields = reader.fields(root, "", &TOP_KEYS);
    let mut config = FileConfig::default();
    if let Some(node) = fields.take("listen") {
        config.listen = reader.texts(node, "listen");
    }
    if let Some(node) = fields.take("stack") {
        config.stack = read_stack(reader, node, document);
    }
    if let Some(node) = fields.take("interfaces") {
        config.interfaces = read_interfaces(reader, node);
    }
    if let Some(node) = fields.take("forwards") {
        config.forwards = read_forwards(reader, node);
    }
    let mut text = |key| fields.take(key).and_then(|node| reader.text(node, key));
    config.log_level = text("log-level");
    config.pid_file = text("pid-file");
    config.log_file = text("log-file");
    config.services = text("services");
    config.notification = text("notification");
    config.ec2_metadata_access = fields
        .take("ec2-metadata-access")
        .and_then(|node| reader.boolean(node, "ec2-metadata-access"))
        .is_some_and(|given| given.value);
    config
}

fn read_stack(reader: &mut Reader, node: &Node, document: &str) -> StackKeys {
    let mut fields = reader.fields(node, "stack.", &STACK_KEYS);
    let mut text = |key: &str| {
        let node = fields.take(key)?;
        reader.text(node, &format!("stack.{key}"))
    };
    let mut stack = StackKeys {
        capture_file: text("capture-file"),
        subnet: text("subnet"),
        gateway_ip: text("gatewayIP"),
        device_ip: text("deviceIP"),
        host_ip: text("hostIP"),
        gateway_mac: text("gatewayMacAddress"),
        ..StackKeys::default()
    };
    let mut boolean = |key: &str| {
        let given = reader.boolean(fields.take(key)?, &format!("stack.{key}"))?;
        given.value.then_some(given.from)
    };
    stack.debug = boolean("debug").is_some();
    stack.ec2_metadata_access = boolean("ec2MetadataAccess").is_some();
    stack.block_all_outbound = fields.take("blockAllOutbound").and_then(|node| {
        let path = "stack.blockAllOutbound";
        if matches!(node.value, Value::Null) {
            // What was to close everything must not become nothing.
            reader.problem(node, format!("{path} is empty (expected true or false)"));
        }
        let given = reader.boolean(node, path)?;
        given.value.then_some(given.from)
    });
    stack.mtu = fields
        .take("mtu")
        .and_then(|node| reader.number(node, "stack.mtu"));
    if let Some(node) = fields.take("dns") {
        stack.dns = read_zones(reader, node);
    }
    let mut texts = |key: &str| match fields.take(key) {
        Some(node) => reader.texts(node, &format!("stack.{key}")),
        None => Vec::new(),
    };
    stack.dns_search_domains = texts("dnsSearchDomains");
    stack.gateway_virtual_ips = texts("gatewayVirtualIPs");
    let mut map = |key: &str, example: &str| match fields.take(key) {
        Some(node) => reader.text_map(node, &format!("stack.{key}"), example),
        None => Vec::new(),
    };
    stack.forwards = map("forwards", "127.0.0.1:2222: 192.168.127.2:22");
    stack.nat = map("nat", "192.168.127.254: 127.0.0.1");
    stack.dhcp_static_leases = map("dhcpStaticLeases", "192.168.127.2: 5a:94:ef:e4:0c:ee");
    stack.vpnkit_uuid_macs = map(
        "vpnKitUUIDMacAddresses",
        "c3d68012-0208-11ea-9fd7-f2189899ab08: 5a:94:ef:e4:0c:ee",
    );
    if let Some(node) = fields.take("networkPolicy") {
        stack.network_policy = read_policy(reader, node, document);
    }
    if let Some(node) = fields.take("outboundAllow") {
        stack.outbound_allow = read_outbound_allow(reader, node);
    }
    stack
}

fn read_zones(reader: &mut Reader, node: &Node) -> Vec<ZoneKeys> {
    let mut zones = Vec::new();
    for (path, node) in reader.list(node, "stack.dns") {
        let mut fields = reader.fields(node, &format!("{path}."), &ZONE_KEYS);
        let records = match fields.take("records") {
            Some(node) => read_records(reader, node, &format!("{path}.records")),
            None => Vec::new(),
        };
        let mut text = |key: &str| reader.text(fields.take(key)?, &format!("{path}.{key}"));
        let (name, default_ip) = (text("name"), text("defaultIP"));
        zones.push(ZoneKeys {
            from: reader.given(node, &path, ()).from,
            name,
            records,
            default_ip,
        });
    }
    zones
}

fn read_records(reader: &mut Reader, node: &Node, path: &str) -> Vec<RecordKeys> {
    let mut records = Vec::new();
    for (path, node) in reader.list(node, path) {
        let mut fields = reader.fields(node, &format!("{path}."), &RECORD_KEYS);
        let mut text = |key: &str| reader.text(fields.take(key)?, &format!("{path}.{key}"));
        let (name, ip, regexp) = (text("name"), text("ip"), text("regexp"));
        let from = reader.given(node, &path, ()).from;
        records.push(RecordKeys {
            from,
            name,
            ip,
            regexp,
        });
    }
    records
}

fn read_interfaces(reader: &mut Reader, node: &Node) -> InterfaceKeys {
    let mut fields = reader.fields(node, "interfaces.", &INTERFACE_KEYS);
    let mut text = |key: &str| reader.text(fields.take(key)?, &format!("interfaces.{key}"));
    InterfaceKeys {
        vpnkit: text("vpnkit"),
        qemu: text("qemu"),
        bess: text("bess"),
        stdio: text("stdio"),
        vfkit: text("vfkit"),
    }
}

fn read_forwards(reader: &mut Reader, node: &Node) -> Vec<ForwardKeys> {
    let mut forwards = Vec::new();
    for (path, node) in reader.list(node, "forwards") {
        let mut fields = reader.fields(node, &format!("{path}."), &FORWARD_KEYS);
        let mut text = |key: &str| reader.text(fields.take(key)?, &format!("{path}.{key}"));
        let (socket, dest) = (text("socket"), text("dest"));
        let (user, identity) = (text("user"), text("identity"));
        forwards.push(ForwardKeys {
            from: reader.given(node, &path, ()).from,
            socket,
            dest,
            user,
            identity,
        });
    }
    forwards
}

fn read_policy(reader: &mut Reader, node: &Node, document: &str) -> Option<Given<String>> {
    const PATH: &str = "stack.networkPolicy";
    // A policy that was cut short must not become none.
    let problem = if inline::is_empty(node) {
        format!("{PATH} is empty (expected at least defaultAction: deny, or no {PATH})")
    } else if !matches!(node.value, Value::Map(_)) {
        format!(
            "{PATH} is {} (expected a mapping, as in a policy file; name a file with -network-policy)",
            node.value
        )
    } else if let Some(text) = inline::mapping(document, node) {
        return Some(reader.given(node, PATH, text));
    } else {
        format!(
            "{PATH} cannot be read apart from the rest of the file, as it uses an anchor from there; write it out, or \
             into a file of its own with -network-policy"
        )
    };
    reader.problem(node, problem);
    None
}

fn read_outbound_allow(reader: &mut Reader, node: &Node) -> Option<Given<String>> {
    const PATH: &str = "stack.outboundAllow";
    let expressions = reader.texts(node, PATH);
    if matches!(&node.value, Value::Null) || matches!(&node.value, Value::List(items) if items.is_empty()) {
        let text = format!(
            "{PATH} is empty, which would restrict nothing; leave it out, or write blockAllOutbound: true"
        );
        reader.problem(node, text);
    }
    // As of a template whose variable has no value.
    let items = match &node.value {
        Value::List(items) => items.as_slice(),
        _ => &[],
    };
    for (number, item) in items.iter().enumerate() {
        if matches!(&item.value, Value::Scalar(scalar) if scalar.text.is_empty()) {
            let text =
                format!("{PATH}[{number}] is empty, which would match every name (expected an expression)");
            reader.problem(item, text);
        }
    }
    let first = expressions.first()?;
    Some(Given {
        value: inline::outbound_allow(&expressions),
        from: first.from.clone(),
    })
}
