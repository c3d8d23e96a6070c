//! `/stats`: the counters of gvproxy's stack by their names, so that who reads one finds it. vnet has another stack and
//! counts otherwise; what has an equivalent has its value (`docs/gvproxy.md` says which), the others are 0.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use vnet_proto::v1;

use super::Services;
use super::answer::Answer;

/// A counter, or a group of them; groups are sorted, as Go's are.
#[derive(Serialize)]
#[serde(untagged)]
enum Node {
    Counter(u64),
    Group(BTreeMap<&'static str, Node>),
}

/// What has a value, by the path of its group and its name.
type Values = BTreeMap<(&'static str, &'static str), u64>;

impl Services {
    /// All counters.
    pub(super) async fn stats(&self) -> Result<Answer, Answer> {
        // One after the other: an older list that came later would count its flows twice.
        let mut traffic = self.traffic.lock().await;
        let vms = self.control.list_vms().await?;
        let flows = self.control.list_flows().await?;
        traffic.take(&flows);
        Ok(Answer::json(&tree(&values(&vms, &flows, &traffic))))
    }
}

/// Bytes of all flows that were live when somebody asked. What a flow moved after it was last seen is not in it; what
/// is, never gets less.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    from_guests: u64,
    to_guests: u64,
    /// What the flows had moved that were live the last time, by id.
    seen: HashMap<String, (u64, u64)>,
}

impl Traffic {
    fn take(&mut self, flows: &[v1::Flow]) {
        let before = std::mem::take(&mut self.seen);
        for flow in flows {
            let (up, down) = before.get(&flow.id).copied().unwrap_or_default();
            let more = |now: u64, before: u64| now.saturating_sub(before);
            self.from_guests = self.from_guests.saturating_add(more(flow.bytes_up, up));
            self.to_guests = self.to_guests.saturating_add(more(flow.bytes_down, down));
            let last = (flow.bytes_up.max(up), flow.bytes_down.max(down));
            self.seen.insert(flow.id.clone(), last);
        }
    }
}

fn values(vms: &[v1::Vm], flows: &[v1::Flow], traffic: &Traffic) -> Values {
    let dropped = |names: &[&str]| -> u64 {
        vms.iter()
            .flat_map(|vm| &vm.dropped_frames)
            .filter(|(reason, _)| names.is_empty() || names.contains(&reason.as_str()))
            .fold(0, |sum, (_, count)| sum.saturating_add(*count))
    };
    let tcp = flows.iter().filter(|flow| {
        let tuple = flow.tuple.as_ref();
        tuple.is_some_and(|tuple| tuple.protocol() == v1::Protocol::Tcp)
    });
    // Sent is towards guests, received is from them, as in the peer.
    Values::from([
        (("", "BytesSent"), traffic.to_guests),
        (("", "BytesReceived"), traffic.from_guests),
        (("", "DroppedPackets"), dropped(&[])),
        (("NICs.Tx", "Bytes"), traffic.to_guests),
        (("NICs.Rx", "Bytes"), traffic.from_guests),
        (("IP", "MalformedPacketsReceived"), dropped(&["malformed"])),
        (("TCP", "CurrentEstablished"), tcp.count() as u64),
        (("TCP", "ForwardMaxInFlightDrop"), dropped(&["held_limit"])),
    ])
}

fn tree(values: &Values) -> Node {
    let mut root = BTreeMap::new();
    for (path, counters) in GROUPS {
        let counters = counters.iter().map(|counter| {
            let value = values.get(&(*path, *counter)).copied().unwrap_or_default();
            (*counter, Node::Counter(value))
        });
        place(&mut root, path).extend(counters);
    }
    Node::Group(root)
}

/// The group at a path, which is made.
fn place<'a>(
    group: &'a mut BTreeMap<&'static str, Node>,
    path: &'static str,
) -> &'a mut BTreeMap<&'static str, Node> {
    let (step, rest) = path.split_once('.').unwrap_or((path, ""));
    if step.is_empty() {
        return group;
    }
    let inner = group.entry(step).or_insert_with(|| Node::Group(BTreeMap::new()));
    match inner {
        Node::Group(inner) => place(inner, rest),
        Node::Counter(_) => unreachable!("no counter of the table has a group's name"),
    }
}

/// The counters of gVisor's `tcpip.Stats` and the two that gvproxy adds, by the path of their group.
const GROUPS: &[(&str, &[&str])] = &[
    ("", &["BytesReceived", "BytesSent", "DroppedPackets"]),
    (
        "NICs",
        &["MalformedL4RcvdPackets", "TxPacketsDroppedNoBufferSpace"],
    ),
    ("NICs.Tx", &["Bytes", "Packets"]),
    ("NICs.Rx", &["Bytes", "Packets"]),
    ("NICs.DisabledRx", &["Bytes", "Packets"]),
    (
        "NICs.Neighbor",
        &[
            "DroppedConfirmationForNoninitiatedNeighbor",
            "DroppedInvalidLinkAddressConfirmations",
            "UnreachableEntryLookups",
        ],
    ),
    ("ICMP", &[]),
    ("ICMP.V4", &[]),
    ("ICMP.V4.PacketsSent", &["Dropped", "RateLimited"]),
    (
        "ICMP.V4.PacketsSent.ICMPv4PacketStats",
        &[
            "DstUnreachable",
            "EchoReply",
            "EchoRequest",
            "InfoReply",
            "InfoRequest",
            "ParamProblem",
            "Redirect",
            "SrcQuench",
            "TimeExceeded",
            "Timestamp",
            "TimestampReply",
        ],
    ),
    ("ICMP.V4.PacketsReceived", &["Invalid"]),
    (
        "ICMP.V4.PacketsReceived.ICMPv4PacketStats",
        &[
            "DstUnreachable",
            "EchoReply",
            "EchoRequest",
            "InfoReply",
            "InfoRequest",
            "ParamProblem",
            "Redirect",
            "SrcQuench",
            "TimeExceeded",
            "Timestamp",
            "TimestampReply",
        ],
    ),
    ("ICMP.V6", &[]),
    ("ICMP.V6.PacketsSent", &["Dropped", "RateLimited"]),
    (
        "ICMP.V6.PacketsSent.ICMPv6PacketStats",
        &[
            "DstUnreachable",
            "EchoReply",
            "EchoRequest",
            "MulticastListenerDone",
            "MulticastListenerQuery",
            "MulticastListenerReport",
            "MulticastListenerReportV2",
            "NeighborAdvert",
            "NeighborSolicit",
            "PacketTooBig",
            "ParamProblem",
            "RedirectMsg",
            "RouterAdvert",
            "RouterSolicit",
            "TimeExceeded",
        ],
    ),
    (
        "ICMP.V6.PacketsReceived",
        &["Invalid", "RouterOnlyPacketsDroppedByHost", "Unrecognized"],
    ),
    (
        "ICMP.V6.PacketsReceived.ICMPv6PacketStats",
        &[
            "DstUnreachable",
            "EchoReply",
            "EchoRequest",
            "MulticastListenerDone",
            "MulticastListenerQuery",
            "MulticastListenerReport",
            "MulticastListenerReportV2",
            "NeighborAdvert",
            "NeighborSolicit",
            "PacketTooBig",
            "ParamProblem",
            "RedirectMsg",
            "RouterAdvert",
            "RouterSolicit",
            "TimeExceeded",
        ],
    ),
    ("IGMP", &[]),
    ("IGMP.PacketsSent", &["Dropped"]),
    (
        "IGMP.PacketsSent.IGMPPacketStats",
        &[
            "LeaveGroup",
            "MembershipQuery",
            "V1MembershipReport",
            "V2MembershipReport",
            "V3MembershipReport",
        ],
    ),
    (
        "IGMP.PacketsReceived",
        &["ChecksumErrors", "Invalid", "Unrecognized"],
    ),
    (
        "IGMP.PacketsReceived.IGMPPacketStats",
        &[
            "LeaveGroup",
            "MembershipQuery",
            "V1MembershipReport",
            "V2MembershipReport",
            "V3MembershipReport",
        ],
    ),
    (
        "IP",
        &[
            "DisabledPacketsReceived",
            "IPTablesForwardDropped",
            "IPTablesInputDropped",
            "IPTablesOutputDropped",
            "IPTablesPostroutingDropped",
            "IPTablesPreroutingDropped",
            "InvalidDestinationAddressesReceived",
            "InvalidSourceAddressesReceived",
            "MalformedFragmentsReceived",
            "MalformedPacketsReceived",
            "OptionRecordRouteReceived",
            "OptionRouterAlertReceived",
            "OptionTimestampReceived",
            "OptionUnknownReceived",
            "OutgoingPacketErrors",
            "PacketsDelivered",
            "PacketsReceived",
            "PacketsSent",
            "ValidPacketsReceived",
        ],
    ),
    (
        "IP.Forwarding",
        &[
            "Errors",
            "ExhaustedTTL",
            "ExtensionHeaderProblem",
            "HostUnreachable",
            "InitializingSource",
            "LinkLocalDestination",
            "LinkLocalSource",
            "NoMulticastPendingQueueBufferSpace",
            "OutgoingDeviceClosedForSend",
            "OutgoingDeviceNoBufferSpace",
            "PacketTooBig",
            "UnexpectedMulticastInputInterface",
            "UnknownOutputEndpoint",
            "Unrouteable",
        ],
    ),
    (
        "ARP",
        &[
            "DisabledPacketsReceived",
            "MalformedPacketsReceived",
            "OutgoingRepliesDropped",
            "OutgoingRepliesSent",
            "OutgoingRequestBadLocalAddressErrors",
            "OutgoingRequestInterfaceHasNoLocalAddressErrors",
            "OutgoingRequestsDropped",
            "OutgoingRequestsSent",
            "PacketsReceived",
            "RepliesReceived",
            "RequestsReceived",
            "RequestsReceivedUnknownTargetAddress",
        ],
    ),
    (
        "TCP",
        &[
            "ActiveConnectionOpenings",
            "ChecksumErrors",
            "CurrentConnected",
            "CurrentEstablished",
            "EstablishedClosed",
            "EstablishedResets",
            "EstablishedTimedout",
            "FailedConnectionAttempts",
            "FailedPortReservations",
            "FastRecovery",
            "FastRetransmit",
            "ForwardMaxInFlightDrop",
            "InvalidSegmentsReceived",
            "ListenOverflowAckDrop",
            "ListenOverflowInvalidSynCookieRcvd",
            "ListenOverflowSynCookieRcvd",
            "ListenOverflowSynCookieSent",
            "ListenOverflowSynDrop",
            "PassiveConnectionOpenings",
            "ResetsReceived",
            "ResetsSent",
            "Retransmits",
            "SACKRecovery",
            "SegmentSendErrors",
            "SegmentsAckedWithDSACK",
            "SegmentsSent",
            "SlowStartRetransmits",
            "SpuriousRTORecovery",
            "SpuriousRecovery",
            "TLPRecovery",
            "Timeouts",
            "ValidSegmentsReceived",
        ],
    ),
    (
        "UDP",
        &[
            "ChecksumErrors",
            "MalformedPacketsReceived",
            "PacketSendErrors",
            "PacketsReceived",
            "PacketsSent",
            "ReceiveBufferErrors",
            "UnknownPortErrors",
        ],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(id: &str, protocol: v1::Protocol, bytes_up: u64, bytes_down: u64) -> v1::Flow {
        v1::Flow {
            id: id.to_owned(),
            tuple: Some(v1::FlowTuple {
                protocol: protocol.into(),
                ..Default::default()
            }),
            bytes_up,
            bytes_down,
            ..Default::default()
        }
    }

    #[test]
    fn bytes_are_added_up_over_flows_that_come_and_go() {
        let mut traffic = Traffic::default();
        let tcp = |id, up, down| flow(id, v1::Protocol::Tcp, up, down);
        for (flows, expected) in [
            (vec![tcp("a", 10, 100), tcp("b", 1, 2)], (11, 102)),
            (vec![tcp("a", 15, 100)], (16, 102)),
            // An older list than the last.
            (vec![tcp("a", 12, 100)], (16, 102)),
            (vec![tcp("a", 16, 101)], (17, 103)),
            (vec![], (17, 103)),
            (vec![tcp("c", 3, 4)], (20, 107)),
        ] {
            traffic.take(&flows);
            assert_eq!((traffic.from_guests, traffic.to_guests), expected);
            assert_eq!(traffic.seen.len(), flows.len(), "what ended is forgotten");
        }
    }

    #[test]
    fn counters_stand_where_gvproxys_do_and_sums_are_of_all_vms() {
        let vm = |malformed| v1::Vm {
            dropped_frames: [("malformed".to_owned(), malformed), ("held_limit".to_owned(), 1)].into(),
            ..Default::default()
        };
        let flows = [
            flow("a", v1::Protocol::Tcp, 10, 20),
            flow("b", v1::Protocol::Udp, 1, 2),
            flow("c", v1::Protocol::Tcp, 0, 0),
        ];
        let mut traffic = Traffic::default();
        traffic.take(&flows);
        let tree = tree(&values(&[vm(2), vm(3)], &flows, &traffic));
        let json = serde_json::to_value(&tree).unwrap();

        assert_eq!(
            (&json["BytesReceived"], &json["BytesSent"]),
            (&11.into(), &22.into())
        );
        assert_eq!(
            (&json["NICs"]["Rx"]["Bytes"], &json["NICs"]["Tx"]["Bytes"]),
            (&11.into(), &22.into())
        );
        assert_eq!(json["NICs"]["Rx"]["Packets"], 0);
        assert_eq!(json["DroppedPackets"], 7);
        assert_eq!(json["TCP"]["CurrentEstablished"], 2);
        assert_eq!(json["TCP"]["ForwardMaxInFlightDrop"], 2);
        assert_eq!(json["IP"]["MalformedPacketsReceived"], 5);
        assert_eq!(json["IP"]["Forwarding"]["Errors"], 0);
        assert_eq!(
            json["ICMP"]["V4"]["PacketsSent"]["ICMPv4PacketStats"]["EchoReply"],
            0
        );
        assert_eq!(
            json["ICMP"]["V6"]["PacketsReceived"]["RouterOnlyPacketsDroppedByHost"],
            0
        );
        let groups = [
            "ARP",
            "BytesReceived",
            "BytesSent",
            "DroppedPackets",
            "ICMP",
            "IGMP",
            "IP",
            "NICs",
            "TCP",
            "UDP",
        ];
        let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, groups);
    }

    #[test]
    fn every_value_has_its_place() {
        for (path, name) in values(&[], &[], &Traffic::default()).keys() {
            let group = GROUPS.iter().find(|(group, _)| group == path);
            assert!(
                group.is_some_and(|(_, names)| names.contains(name)),
                "{path} {name}"
            );
        }
    }
}
