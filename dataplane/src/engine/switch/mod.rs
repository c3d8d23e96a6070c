//! Between two guests: what passes plainly, what passes because a rule says so, and what does not.
//!
//! Where both guests are open (neither is under a policy or mode), frames are switched by their MAC
//! addresses, as on any switch. Everywhere else nothing passes but flows that were let through, one by one:
//!
//! - A new flow to another guest's address is judged like any other (`judge.rs`), under the guard for
//!   guests, so that only a rule or grant which names the address opens it. [`flow`] is what becomes of it.
//! - What the other guest sends passes back only as a part of such a flow. Everything else of it is its own
//!   flow, judged under its own policy.
//! - ARP and neighbour discovery never pass. The gateway answers for other guests, with their own MAC
//!   addresses (`tell_mac`, `discovery.rs`).
//!
//! An engine has no other guest's state in reach. It hands packets to the network ([`Passed`]), which puts
//! them into the other driver's inbox; what both ends must agree on without a message is one [`Permit`].

mod ends;
pub mod flow;
pub mod permit;
mod receiving;
mod sending;
mod track;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use vnet_proto::model::VmId;

use crate::engine::frame::{Arp, Body, DropReason, EtherType, Frame};
use crate::engine::gateway::ndp;
use crate::engine::ip::Ip;
use crate::engine::switch::permit::Permit;
use crate::engine::{Engine, Outcome, Time, inbound};
use crate::mac::Mac;

/// Another guest of the network, as the owner of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// Its handle.
    pub vm: VmId,
    /// The MAC address that the address belongs to.
    pub mac: Mac,
    /// Whether frames may be switched to it plainly.
    pub open: bool,
}

/// What one guest's driver hands to another's.
#[derive(Debug)]
pub enum Passed {
    /// A frame, between two guests that are open.
    Frame(Box<[u8]>),
    /// A packet of a flow that was let through.
    Packet(Packet),
}

/// An IP packet from one guest to another, never a fragment.
#[derive(Debug)]
pub struct Packet {
    /// Whose it is.
    pub from: VmId,
    /// That guest's MAC address.
    pub mac: Mac,
    /// The flow's permit, until the other end has it.
    pub permit: Option<Arc<Permit>>,
    /// The packet.
    pub bytes: Box<[u8]>,
}

impl Engine {
    /// A frame that is not for the gateway: switched where this guest is open, filtered where it is not.
    pub(super) fn switch<'a>(&mut self, now: Time, frame: &Frame<'a>) -> Result<Outcome<'a>, DropReason> {
        if let Body::Ipv4(ip) | Body::Ipv6(ip) = &frame.body
            && inbound::is_dhcp_answer(ip)
        {
            return Err(DropReason::RogueDhcp);
        }
        if self.settings.switch_open {
            Ok(Outcome::Switch(frame.destination))
        } else {
            self.filter(now, frame)
        }
    }

    /// A frame of [`Outcome::Switch`] that the other guest is not open for: it is filtered after all.
    pub fn handle_unswitched<'a>(&mut self, now: Time, bytes: &'a [u8]) -> Outcome<'a> {
        // The sender's addresses were checked when the frame came in.
        match Frame::parse(bytes).and_then(|frame| self.filter(now, &frame)) {
            Ok(outcome) => outcome,
            Err(reason) => {
                self.count_drop(reason);
                Outcome::Done
            }
        }
    }

    /// Where a packet goes that a guest sends to its router though it is for another guest, while both are
    /// open: the switch carries it as if it had been sent there.
    pub(super) fn routed(&self, ip: &Ip<'_>) -> Option<Mac> {
        if !self.settings.switch_open || !self.is_guest_address(ip.destination) {
            return None;
        }
        self.surroundings
            .neighbour(ip.destination)
            .filter(|n| n.open && n.vm != self.config.vm && !inbound::is_dhcp_answer(ip))
            .map(|n| n.mac)
    }

    /// Whether frames between this guest and another one, at this address, are switched plainly now.
    fn is_switched_to(&self, address: IpAddr, vm: VmId) -> bool {
        self.settings.switch_open
            && self
                .surroundings
                .neighbour(address)
                .is_some_and(|n| n.open && n.vm == vm)
    }

    /// On a closed switch the IP address says whom a frame is for. A MAC address that was learned while the
    /// switch was open, or that a guest has no more, leads nowhere else.
    fn filter<'a>(&mut self, now: Time, frame: &Frame<'a>) -> Result<Outcome<'a>, DropReason> {
        match &frame.body {
            // What is said of neighbours was answered, or is for nobody.
            Body::Ipv6(ip) if ndp::is_discovery(ip) => Err(DropReason::GuestToGuest),
            Body::Ipv4(ip) | Body::Ipv6(ip)
                if frame.destination.is_unicast() && self.is_guest_address(ip.destination) =>
            {
                self.handle_ip(now, ip)
            }
            _ => Err(DropReason::GuestToGuest),
        }
    }

    /// Answers an ARP request for the gateway, an address that it stands for, or a guest that this one may not ask
    /// itself.
    /// `None`: it is not the gateway's to answer.
    ///
    /// Of another guest its own MAC address is told. So no guest's ARP reaches another, and nobody can be
    /// made to believe anything; duplicate address detection finds an address taken (RFC 5227 §2.1); and
    /// what was learned stays true when the switch between the two opens or closes.
    pub(super) fn tell_mac(&mut self, arp: &Arp) -> Option<bool> {
        if !arp.is_request {
            return None;
        }
        let mac = if arp.target == self.config.gateway || self.config.nat.is_answered(arp.target) {
            self.config.gateway_mac
        } else {
            self.closed_neighbour(arp.target.into())?.mac
        };
        let sent = self
            .transmit
            .packet_from(mac, EtherType::Arp, Arp::BYTES, |out| arp.write_reply(mac, out));
        Some(sent.is_some())
    }

    /// Tells the guest the gateway's hardware address, unasked.
    pub fn announce_gateway(&mut self) {
        let mac = self.config.gateway_mac;
        let arp = Arp {
            is_request: true,
            sender_mac: self.transmit.guest,
            sender: self.addresses.first().copied().unwrap_or(Ipv4Addr::UNSPECIFIED),
            target: self.config.gateway,
        };
        let write = |out: &mut [u8]| arp.write_reply(mac, out);
        // Without room, more is on its way to the guest already.
        let _ = self.transmit.packet_from(mac, EtherType::Arp, Arp::BYTES, write);
    }

    /// Asks the guest whether an address is its own (RFC 826). The answer shows it, as any frame of it would.
    pub fn seek(&mut self, address: Ipv4Addr) {
        if !self.is_guest_address(address.into()) {
            return;
        }
        let arp = Arp {
            is_request: true,
            sender_mac: self.config.gateway_mac,
            sender: self.config.gateway,
            target: address,
        };
        let (from, write) = (self.config.gateway_mac, |out: &mut [u8]| arp.write_request(out));
        // Without room, more is on its way to the guest already, and it will be asked again.
        let _ = self
            .transmit
            .packet_between(from, Mac::BROADCAST, EtherType::Arp, Arp::BYTES, write);
    }

    /// The other guest that has an address, unless the switch between the two is open.
    pub(super) fn closed_neighbour(&self, address: IpAddr) -> Option<Neighbour> {
        if !self.is_guest_address(address) || self.has_address(address) {
            return None;
        }
        self.surroundings
            .neighbour(address)
            .filter(|n| n.vm != self.config.vm && !(n.open && self.settings.switch_open))
    }
}
