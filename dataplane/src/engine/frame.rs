//! Parses a guest's frame once: bytes to [`Frame`], or the [`DropReason`] why not.
//!
//! Ethernet II (no VLAN tags) and ARP (RFC 826); what IP packets say is [`super::ip`]'s. Checksums of what a
//! guest sends are not verified: hypervisors that offload leave them unfinished, and a wrong one harms only
//! the guest's own stream. Lengths are, always.

use std::net::Ipv4Addr;

use crate::engine::ip::Ip;
use crate::mac::Mac;

/// An Ethernet header, bytes.
pub const ETHERNET_BYTES: usize = 14;

/// What an Ethernet frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EtherType {
    /// IPv4.
    Ipv4,
    /// ARP.
    Arp,
    /// IPv6.
    Ipv6,
}

impl From<EtherType> for u16 {
    fn from(ether_type: EtherType) -> u16 {
        match ether_type {
            EtherType::Ipv4 => 0x0800,
            EtherType::Arp => 0x0806,
            EtherType::Ipv6 => 0x86dd,
        }
    }
}

/// Why a frame was not delivered. The same word in code, metric and docs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// Shorter than its headers say, or a length that contradicts itself.
    Malformed,
    /// Not the MAC address that is bound to this link.
    SpoofedMac,
    /// A source address that is another guest's, the gateway's, or outside the subnet.
    SpoofedAddress,
    /// More addresses than one link may bind.
    AddressLimit,
    /// An EtherType that the network does not carry.
    EtherType,
    /// IPv6, on a network that was told not to carry it.
    Ipv6,
    /// An IP protocol, extension or ICMP message that the network does not carry.
    IpProtocol,
    /// A destination that no guest may send to (multicast, broadcast, loopback, reserved).
    Destination,
    /// A fragment that could not be put together.
    Fragment,
    /// Another guest, and the switch is closed between the two.
    GuestToGuest,
    /// A MAC address that nobody on the network has.
    UnknownStation,
    /// Another guest's queue is full.
    PeerQueueFull,
    /// The queue towards the guest is full.
    TransmitQueueFull,
    /// A limit of flows was reached.
    FlowLimit,
    /// A limit of held misses or held packets was reached.
    HeldLimit,
    /// Denied by a verdict, in silence or not.
    Denied,
    /// What the host would not take: a datagram, or a flow that it has no route for.
    HostRefused,
    /// A gateway service that is not offered.
    GatewayService,
    /// Longer than the link may carry.
    Oversize,
    /// The queue from a socket that several VMs share is full: this one sends more than is taken.
    ReceiveQueueFull,
    /// A DHCP answer from a guest: only the gateway gives addresses.
    RogueDhcp,
    /// What only a router says (router advertisement, redirect), or an advertisement of an address that is
    /// not the guest's.
    RogueNdp,
}

impl DropReason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 22] = [
        Self::Malformed,
        Self::SpoofedMac,
        Self::SpoofedAddress,
        Self::AddressLimit,
        Self::EtherType,
        Self::Ipv6,
        Self::IpProtocol,
        Self::Destination,
        Self::Fragment,
        Self::GuestToGuest,
        Self::UnknownStation,
        Self::PeerQueueFull,
        Self::TransmitQueueFull,
        Self::FlowLimit,
        Self::HeldLimit,
        Self::Denied,
        Self::HostRefused,
        Self::GatewayService,
        Self::Oversize,
        Self::ReceiveQueueFull,
        Self::RogueDhcp,
        Self::RogueNdp,
    ];

    /// Its word in metrics and docs.
    pub fn word(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::SpoofedMac => "spoofed_mac",
            Self::SpoofedAddress => "spoofed_address",
            Self::AddressLimit => "address_limit",
            Self::EtherType => "ether_type",
            Self::Ipv6 => "ipv6",
            Self::IpProtocol => "ip_protocol",
            Self::Destination => "destination",
            Self::Fragment => "fragment",
            Self::GuestToGuest => "guest_to_guest",
            Self::UnknownStation => "unknown_station",
            Self::PeerQueueFull => "peer_queue_full",
            Self::TransmitQueueFull => "transmit_queue_full",
            Self::FlowLimit => "flow_limit",
            Self::HeldLimit => "held_limit",
            Self::Denied => "denied",
            Self::HostRefused => "host_refused",
            Self::GatewayService => "gateway_service",
            Self::Oversize => "oversize",
            Self::ReceiveQueueFull => "receive_queue_full",
            Self::RogueDhcp => "rogue_dhcp",
            Self::RogueNdp => "rogue_ndp",
        }
    }
}

/// A frame, taken apart.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// Who sent it, as it claims.
    pub source: Mac,
    /// Whom it is for.
    pub destination: Mac,
    /// What it carries.
    pub body: Body<'a>,
}

/// What a frame carries.
#[derive(Debug, Clone, Copy)]
pub enum Body<'a> {
    /// ARP for IPv4 over Ethernet.
    Arp(Arp),
    /// IPv4.
    Ipv4(Ip<'a>),
    /// IPv6.
    Ipv6(Ip<'a>),
}

/// An ARP packet (RFC 826) for IPv4 over Ethernet.
#[derive(Debug, Clone, Copy)]
pub struct Arp {
    /// Request (true) or reply.
    pub is_request: bool,
    /// Sender hardware address.
    pub sender_mac: Mac,
    /// Sender protocol address; unspecified in a probe (RFC 5227 §2.1.1).
    pub sender: Ipv4Addr,
    /// Target protocol address.
    pub target: Ipv4Addr,
}

impl<'a> Frame<'a> {
    /// Takes a frame apart.
    ///
    /// # Errors
    /// Why it cannot be delivered.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let (header, body) = bytes
            .split_first_chunk::<ETHERNET_BYTES>()
            .ok_or(DropReason::Malformed)?;
        let mac = |at: usize| {
            Mac([
                header[at],
                header[at + 1],
                header[at + 2],
                header[at + 3],
                header[at + 4],
                header[at + 5],
            ])
        };
        let body = match u16::from_be_bytes([header[12], header[13]]) {
            0x0800 => Body::Ipv4(Ip::parse_ipv4(body)?),
            0x0806 => Body::Arp(Arp::parse(body)?),
            0x86dd => Body::Ipv6(Ip::parse_ipv6(body)?),
            _ => return Err(DropReason::EtherType),
        };
        Ok(Self {
            source: mac(6),
            destination: mac(0),
            body,
        })
    }
}

impl Arp {
    /// An ARP packet, bytes.
    pub const BYTES: usize = 28;

    fn parse(bytes: &[u8]) -> Result<Self, DropReason> {
        let packet = bytes
            .first_chunk::<{ Self::BYTES }>()
            .ok_or(DropReason::Malformed)?;
        let operation = u16::from_be_bytes([packet[6], packet[7]]);
        if packet[..6] != [0, 1, 8, 0, 6, 4] || !(1..=2).contains(&operation) {
            return Err(DropReason::Malformed);
        }
        let address = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
        let mut sender_mac = [0; 6];
        sender_mac.copy_from_slice(&packet[8..14]);
        Ok(Self {
            is_request: operation == 1,
            sender_mac: Mac(sender_mac),
            sender: address(14),
            target: address(24),
        })
    }

    /// Writes this as a request.
    pub fn write_request(&self, out: &mut [u8]) {
        out[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        out[8..14].copy_from_slice(&self.sender_mac.0);
        out[14..18].copy_from_slice(&self.sender.octets());
        out[18..24].fill(0);
        out[24..28].copy_from_slice(&self.target.octets());
    }

    /// Writes the reply that `mac` has the requested address.
    pub fn write_reply(&self, mac: Mac, out: &mut [u8]) {
        out[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
        out[8..14].copy_from_slice(&mac.0);
        out[14..18].copy_from_slice(&self.target.octets());
        out[18..24].copy_from_slice(&self.sender_mac.0);
        out[24..28].copy_from_slice(&self.sender.octets());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..200_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let length = (state >> 33) as usize % 80;
            let mut bytes: Vec<u8> = (0..length).map(|i| (state >> (i % 57)) as u8).collect();
            if length > 20 && state & 1 == 0 {
                bytes[12..14].copy_from_slice(&[[8, 0], [8, 6], [0x86, 0xdd]][(state >> 7) as usize % 3]);
                bytes[14] = [0x45, 0x60][(state >> 9) as usize % 2];
            }
            let _ = Frame::parse(&bytes);
        }
    }

    #[test]
    fn a_frame_carries_what_its_type_says() {
        assert_eq!(Frame::parse(&[0; 13]).unwrap_err(), DropReason::Malformed);
        let mut frame = vec![2; 12];
        frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 59, 64]);
        frame.extend_from_slice(&[0; 32]);
        assert!(matches!(Frame::parse(&frame).unwrap().body, Body::Ipv6(_)));
        frame[12..14].copy_from_slice(&[8, 0]);
        assert_eq!(Frame::parse(&frame).unwrap_err(), DropReason::Malformed);
        frame[12..14].copy_from_slice(&[0x81, 0]);
        assert_eq!(Frame::parse(&frame).unwrap_err(), DropReason::EtherType);
    }

    #[test]
    fn reasons_are_numbered_as_listed() {
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
        }
    }
}
