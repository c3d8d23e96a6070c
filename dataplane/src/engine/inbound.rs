//! What a guest sends to the network itself: ARP, DHCP, and IPv4 towards the gateway.

use std::net::Ipv4Addr;

use crate::engine::frame::{Arp, DropReason, Frame, Ipv4};
use crate::engine::reply::{self, ICMP, TCP, UDP};
use crate::engine::{Engine, Outcome, Time};
use crate::mac::Mac;

const DHCP_SERVER_PORT: u16 = 67;
const DHCP_CLIENT_PORT: u16 = 68;

impl Engine {
    pub(super) fn handle_arp<'a>(
        &mut self,
        now: Time,
        frame: &Frame<'a>,
        arp: &Arp,
    ) -> Result<Outcome<'a>, DropReason> {
        if arp.sender_mac != frame.source {
            return Err(DropReason::SpoofedMac);
        }
        // A probe (RFC 5227 §2.1.1) has no sender yet and claims nothing.
        if arp.sender != Ipv4Addr::UNSPECIFIED {
            self.check_source(now, frame.source, arp.sender)?;
        }
        match self.tell_mac(arp) {
            Some(true) => return Ok(Outcome::Done),
            Some(false) => return Err(DropReason::TransmitQueueFull),
            None => {}
        }
        if frame.destination == self.config.gateway_mac || arp.target == arp.sender {
            // A reply to us, or an announcement, which the claim above has taken note of.
            return Ok(Outcome::Done);
        }
        self.switch(now, frame)
    }

    /// DHCP goes to the gateway's server whatever its addresses, and nowhere else.
    pub(super) fn is_dhcp(&self, ip: &Ipv4<'_>) -> bool {
        ip.protocol == UDP
            && !ip.is_fragment()
            && ip.payload().get(2..4) == Some(&DHCP_SERVER_PORT.to_be_bytes())
            && (ip.destination == Ipv4Addr::BROADCAST
                || ip.destination == self.config.gateway
                || ip.destination == self.config.subnet.broadcast())
    }

    pub(super) fn handle_dhcp(&mut self, now: Time, source: Mac, ip: &Ipv4<'_>) {
        let Some(message) = ip.payload().get(8..) else {
            self.count_drop(DropReason::Malformed);
            return;
        };
        let outcome = self.surroundings.dhcp(self.config.vm, source, message, now);
        if let Some(address) = outcome.bound {
            self.bind_address(address);
        }
        if let Some(address) = outcome.released {
            self.addresses.retain(|a| *a != address);
            self.end_switched_of(now, address);
            self.note_status();
        }
        if let Some(name) = outcome.claimed_hostname
            && name != self.claimed_hostname
        {
            self.claimed_hostname = name;
            self.note_status();
        }
        self.want_report(now);
        let Some(answer) = outcome.reply else { return };
        let from = std::net::SocketAddrV4::new(self.config.gateway, DHCP_SERVER_PORT);
        let to = std::net::SocketAddrV4::new(answer.to, DHCP_CLIENT_PORT);
        let guest = std::mem::replace(&mut self.transmit.guest, answer.to_mac);
        if !reply::udp(
            &mut self.transmit,
            from,
            to,
            &answer.payload,
            self.config.mtu_bytes,
        ) {
            self.count_drop(DropReason::TransmitQueueFull);
        }
        self.transmit.guest = guest;
    }

    pub(super) fn handle_ipv4<'a>(&mut self, now: Time, ip: Ipv4<'a>) -> Result<Outcome<'a>, DropReason> {
        if ip.is_fragment() {
            return self.handle_fragment(now, &ip);
        }
        match ip.protocol {
            TCP => self.handle_tcp(now, ip),
            UDP => self.handle_udp(now, ip),
            ICMP => self.handle_icmp(now, ip),
            _ => Err(DropReason::IpProtocol),
        }
    }

    /// Fragments become one packet before anything looks at ports. TCP is never fragmented by an
    /// honest guest: the MSS sees to that.
    fn handle_fragment<'a>(&mut self, now: Time, part: &Ipv4<'_>) -> Result<Outcome<'a>, DropReason> {
        if !matches!(part.protocol, UDP | ICMP) {
            return Err(DropReason::Fragment);
        }
        let Some(packet) = self.fragments.handle(now, part)? else {
            return Ok(Outcome::Done);
        };
        let whole = Ipv4::parse(&packet)?;
        let outcome = if whole.protocol == UDP {
            self.handle_udp(now, whole)?
        } else {
            self.handle_icmp(now, whole)?
        };
        let (flow, payload) = match outcome {
            Outcome::Datagram { flow, payload } => (flow, payload),
            Outcome::Echo { flow, message } => (flow, message),
            Outcome::Pass { flow, packet } => (flow, packet),
            Outcome::Done | Outcome::Assembled { .. } | Outcome::Switch(_) => return Ok(Outcome::Done),
        };
        Ok(Outcome::Assembled {
            flow,
            payload: payload.to_vec(),
        })
    }
}

/// Whether a packet comes from a DHCP server's port.
pub(super) fn is_dhcp_answer(ip: &Ipv4<'_>) -> bool {
    ip.protocol == UDP
        && ip.fragment_offset == 0
        && ip.payload().get(..2) == Some(&DHCP_SERVER_PORT.to_be_bytes())
}
