//! `forwards`: from the file's nodes to [`ForwardRule`]s.

use std::collections::HashMap;
use std::net::IpAddr;
use std::str::FromStr;

use vnet_proto::model::{PortRange, Protocol};

use super::rules::{Head, has_leading_zero, read_head, read_ports};
use super::{LIST_MAX, read_selector};
use crate::policy::keys;
use crate::policy::reader::Reader;
use crate::policy::yaml::{Node, Value};
use crate::policy::{FORWARD_RULES_MAX, ForwardAction, ForwardRule, ListenRange};

/// What can be forwarded.
pub(crate) const FORWARD_PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

pub(super) fn read_forwards(reader: &mut Reader, node: &Node) -> Vec<ForwardRule> {
    let mut first_of: HashMap<String, u32> = HashMap::new();
    let mut rules = Vec::new();
    for (index, node) in reader
        .list(node, "forwards", FORWARD_RULES_MAX)
        .iter()
        .enumerate()
    {
        let Some(rule) = read_forward(reader, node, index) else {
            continue;
        };
        if let Some(line) = first_of.insert(rule.label.clone(), rule.line) {
            let text = format!(
                "rule name {:?} is taken by the rule of forwards in line {line}; names are unique",
                rule.label
            );
            reader.problem(node, text);
        }
        rules.push(rule);
    }
    rules
}

fn read_forward(reader: &mut Reader, node: &Node, index: usize) -> Option<ForwardRule> {
    let what = format!("forwards[{index}]");
    let mut fields = reader.fields(node, &what, &keys::FORWARD_RULE);
    if !fields.are_a_mapping() {
        return None;
    }
    let Head {
        label,
        comment,
        action,
    } = read_head(reader, &mut fields, node, &what, &ForwardAction::ALL);
    let protocol = fields
        .take("protocol")
        .and_then(|node| reader.one_of(node, "protocol", &FORWARD_PROTOCOLS));
    let listen = fields
        .take("listen")
        .map(|node| read_listen(reader, node))
        .unwrap_or_default();
    let guest_ports = fields
        .take("guestPorts")
        .map(|node| read_ports(reader, node, "guestPorts"))
        .unwrap_or_default();
    let vms = fields
        .take("vm")
        .and_then(|node| read_selector(reader, node, "vm"));
    Some(ForwardRule {
        label: label.unwrap_or(what),
        action: action?,
        protocol,
        listen,
        guest_ports,
        vms,
        comment: comment.unwrap_or_default(),
        line: node.place.line,
        column: node.place.column,
    })
}

fn read_listen(reader: &mut Reader, node: &Node) -> Vec<ListenRange> {
    let mut ranges = Vec::new();
    for node in reader.list_of_some(node, "listen", LIST_MAX) {
        let read = match &node.value {
            Value::Int(port) => listen_range(&port.to_string()),
            Value::Text(text) => listen_range(text),
            other => Err(expected(&other.to_string())),
        };
        match read {
            Ok(range) => ranges.push(range),
            Err(text) => reader.problem(node, format!("listen: {text}")),
        }
    }
    ranges
}

fn expected(found: &str) -> String {
    format!(
        "{found:?} is not where a forward can listen (expected ports, an address of loopback, or both, as \
         \"8000-8999\" or \"127.0.0.1:8080\")"
    )
}

/// `8080`, `8000-8999`, `127.0.0.1`, `[::1]`, `127.0.0.1:8080`, `[::1]:8000-8999`.
fn listen_range(text: &str) -> Result<ListenRange, String> {
    let is_ports = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'-');
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .filter(|bare| bare.contains(':'));
    let (address, ports) = if is_ports(text) {
        (None, Some(text))
    } else if let Ok(address) = bare.unwrap_or(text).parse::<IpAddr>() {
        (Some(address), None)
    } else {
        let (address, ports) = text.rsplit_once(':').ok_or_else(|| expected(text))?;
        let inner = address
            .strip_prefix('[')
            .and_then(|inner| inner.strip_suffix(']'));
        let address: IpAddr = inner.unwrap_or(address).parse().map_err(|_| expected(text))?;
        if address.is_ipv6() != inner.is_some() {
            return Err(expected(text));
        }
        (Some(address), Some(ports))
    };
    let address = address.map(|address| address.to_canonical());
    if let Some(other) = address.filter(|address| !address.is_loopback()) {
        return Err(format!(
            "{other} is not an address of loopback, where alone a VM may open a port (expected 127.0.0.1 or [::1])"
        ));
    }
    let ports = ports.map(|ports| {
        if has_leading_zero(ports) {
            return Err(expected(text));
        }
        PortRange::from_str(ports)
    });
    Ok(ListenRange {
        address,
        ports: ports.transpose()?,
    })
}
