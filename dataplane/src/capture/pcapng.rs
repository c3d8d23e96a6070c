//! pcapng, as far as captures write it: a section, an interface for each VM, packets, statistics.
//!
//! Source: draft-ietf-opsawg-pcapng, sections 4.1 (Section Header), 4.2 (Interface Description), 4.3 (Enhanced
//! Packet) and 4.6 (Interface Statistics). Everything is little-endian, link type Ethernet, in nanoseconds.
//!
//! Four blocks of our own rather than a crate: `pcap-file` 2.0, the only one with all of them, writes the time of a
//! statistics block with its halves the wrong way round where the section is little-endian, encodes each packet
//! twice to learn its length, and had its last stable release in 2023.

use vnet_proto::model::CAPTURE_SNAP_BYTES_MAX;

/// The longest part of a frame that is kept where nobody says otherwise, bytes: more than any frame has.
pub const SNAP_BYTES_DEFAULT: u32 = CAPTURE_SNAP_BYTES_MAX;

/// Which way a packet went, as the VM's own network card sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the VM.
    Inbound,
    /// From the VM.
    Outbound,
}

/// A packet as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketBlock<'a> {
    /// The interface's number, as [`Pcapng::interface`] gave it.
    pub interface: u32,
    /// Nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// Which way.
    pub direction: Direction,
    /// Bytes that the frame had.
    pub original_length: u32,
    /// What is kept of it.
    pub data: &'a [u8],
}

/// Encodes one section into a buffer, which its owner empties.
#[derive(Debug)]
pub struct Pcapng {
    bytes: Vec<u8>,
    interfaces: u32,
}

impl Default for Pcapng {
    fn default() -> Self {
        Self::new()
    }
}

impl Pcapng {
    /// A section that begins; its header is in the buffer.
    pub fn new() -> Self {
        let mut this = Self {
            bytes: Vec::with_capacity(4096),
            interfaces: 0,
        };
        this.block(SECTION_HEADER, |bytes| {
            bytes.extend(BYTE_ORDER_MAGIC.to_le_bytes());
            bytes.extend(1u16.to_le_bytes());
            bytes.extend(0u16.to_le_bytes());
            // The section's length is not known beforehand.
            bytes.extend(u64::MAX.to_le_bytes());
            option(bytes, SHB_USERAPPL, PROGRAM.as_bytes());
            end_of_options(bytes);
        });
        this
    }

    /// Adds an interface. `filter` is the text of the capture's filter, empty for none.
    pub fn interface(&mut self, name: &str, snap_bytes: u32, filter: &str) -> u32 {
        self.block(INTERFACE_DESCRIPTION, |bytes| {
            bytes.extend(LINKTYPE_ETHERNET.to_le_bytes());
            bytes.extend(0u16.to_le_bytes());
            bytes.extend(snap_bytes.to_le_bytes());
            option(bytes, IF_NAME, name.as_bytes());
            option(bytes, IF_TSRESOL, &[NANOSECONDS]);
            if !filter.is_empty() {
                // A zero says that text follows.
                let text: Vec<u8> = std::iter::once(0).chain(filter.bytes()).collect();
                option(bytes, IF_FILTER, &text);
            }
            end_of_options(bytes);
        });
        self.interfaces += 1;
        self.interfaces - 1
    }

    /// How many interfaces there are.
    pub fn interfaces(&self) -> u32 {
        self.interfaces
    }

    /// Adds a packet.
    pub fn packet(&mut self, packet: &PacketBlock<'_>) {
        let flags: u32 = match packet.direction {
            Direction::Inbound => 1,
            Direction::Outbound => 2,
        };
        let captured = u32::try_from(packet.data.len()).unwrap_or(u32::MAX);
        self.block(ENHANCED_PACKET, |bytes| {
            bytes.extend(packet.interface.to_le_bytes());
            time(bytes, packet.at_ns);
            bytes.extend(captured.to_le_bytes());
            bytes.extend(packet.original_length.to_le_bytes());
            bytes.extend_from_slice(packet.data);
            pad(bytes, packet.data.len());
            option(bytes, EPB_FLAGS, &flags.to_le_bytes());
            end_of_options(bytes);
        });
    }

    /// Says of an interface how many packets the capture wanted until `at_ns`, and how many of those it lost.
    pub fn statistics(&mut self, interface: u32, at_ns: u64, received: u64, dropped: u64) {
        self.block(INTERFACE_STATISTICS, |bytes| {
            bytes.extend(interface.to_le_bytes());
            time(bytes, at_ns);
            option(bytes, ISB_IFRECV, &received.to_le_bytes());
            option(bytes, ISB_IFDROP, &dropped.to_le_bytes());
            end_of_options(bytes);
        });
    }

    /// How many bytes a packet takes that has `data` of them.
    pub fn packet_bytes(data: usize) -> usize {
        PACKET_BYTES + data.next_multiple_of(4)
    }

    /// What is to be written.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// It has been written.
    pub fn clear(&mut self) {
        self.bytes.clear();
        // One large frame is no reason to keep its room for ever.
        self.bytes.shrink_to(KEPT_BYTES);
    }

    fn block(&mut self, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend([0; 4]);
        body(&mut self.bytes);
        // A frame is at most 128 KiB and a name 64 bytes: far from what 32 bits say.
        let length = u32::try_from(self.bytes.len() - start + 4).unwrap_or(u32::MAX);
        self.bytes.extend(length.to_le_bytes());
        self.bytes[start + 4..start + 8].copy_from_slice(&length.to_le_bytes());
    }
}

/// The two halves of a time, the high one first whatever the byte order.
fn time(bytes: &mut Vec<u8>, at_ns: u64) {
    let [high, low] = [(at_ns >> 32) as u32, at_ns as u32];
    bytes.extend(high.to_le_bytes());
    bytes.extend(low.to_le_bytes());
}

fn option(bytes: &mut Vec<u8>, code: u16, value: &[u8]) {
    // No value of ours is longer; one that were is cut to what its length can say.
    let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
    let value = &value[..length.into()];
    bytes.extend(code.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend_from_slice(value);
    pad(bytes, value.len());
}

fn pad(bytes: &mut Vec<u8>, length: usize) {
    bytes.extend(std::iter::repeat_n(0, length.wrapping_neg() % 4));
}

fn end_of_options(bytes: &mut Vec<u8>) {
    bytes.extend([0; 4]);
}

const PROGRAM: &str = concat!("vnet ", env!("CARGO_PKG_VERSION"));
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
const LINKTYPE_ETHERNET: u16 = 1;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const IF_FILTER: u16 = 11;
const EPB_FLAGS: u16 = 2;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;
/// Units of 10^-9 s.
const NANOSECONDS: u8 = 9;
/// What a packet's block has beside its data, bytes.
const PACKET_BYTES: usize = 44;
/// A block of statistics, bytes.
pub const STATISTICS_BYTES: usize = 52;
/// Room that an emptied buffer keeps, bytes.
const KEPT_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let mut section = Pcapng::new();
        let header = section.bytes().to_vec();
        assert_eq!(header[..4], [0x0a, 0x0d, 0x0d, 0x0a]);
        assert_eq!(
            header[8..24],
            *b"\x4d\x3c\x2b\x1a\x01\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"
        );
        assert_eq!(
            header[4..8],
            header[header.len() - 4..],
            "its length stands at both ends"
        );
        assert_eq!(header[24..26], [4, 0], "shb_userappl");
        section.clear();

        assert_eq!(section.interface("web", SNAP_BYTES_DEFAULT, "tcp"), 0);
        assert_eq!(
            section.bytes(),
            b"\x01\0\0\0\x30\0\0\0\x01\0\0\0\0\0\x04\0\
              \x02\0\x03\0web\0\x09\0\x01\0\x09\0\0\0\x0b\0\x04\0\0tcp\0\0\0\0\x30\0\0\0"
        );
        section.clear();

        section.packet(&PacketBlock {
            interface: 0,
            at_ns: 0x0102_0304_0506_0708,
            direction: Direction::Outbound,
            original_length: 9,
            data: b"frame",
        });
        assert_eq!(
            section.bytes(),
            b"\x06\0\0\0\x34\0\0\0\0\0\0\0\x04\x03\x02\x01\x08\x07\x06\x05\x05\0\0\0\x09\0\0\0frame\0\0\0\
              \x02\0\x04\0\x02\0\0\0\0\0\0\0\x34\0\0\0"
        );
        assert_eq!(section.bytes().len(), Pcapng::packet_bytes(5));
        section.clear();

        section.statistics(0, 0x0102_0304_0506_0708, 7, 2);
        assert_eq!(
            section.bytes(),
            b"\x05\0\0\0\x34\0\0\0\0\0\0\0\x04\x03\x02\x01\x08\x07\x06\x05\
              \x04\0\x08\0\x07\0\0\0\0\0\0\0\x05\0\x08\0\x02\0\0\0\0\0\0\0\0\0\0\0\x34\0\0\0"
        );
        assert_eq!(section.bytes().len(), STATISTICS_BYTES);
    }
}
