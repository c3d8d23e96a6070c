//! The filter against a second terminal in memory that stands for the user's.

use std::num::NonZeroU16;

use super::*;

const ROWS: u16 = 24;
const COLUMNS: u16 = 80;

fn passed(output: &str) -> String {
    Filter::new(Some((ROWS, COLUMNS))).feed(output.as_bytes()).shown
}

/// The user's terminal.
fn terminal() -> vt100::Parser {
    let size = |number| NonZeroU16::new(number).unwrap();
    vt100::Parser::new(size(ROWS), size(COLUMNS), 0)
}

#[test]
fn ordinary_output_passes_as_it_is() {
    for output in [
        "plain text, bücher, 日本\r\n",
        "\x1b[1;31mred\x1b[m \x1b[38;2;1;2;3mtrue\x1b[m \x1b[4:3mcurly\x1b[m",
        "50 %\r\x1b[K100 %\x08\t\x07",
        "\x1b[2A\x1b[10;20H\x1b[J\x1b[2K\x1b[3L\x1b[s\x1b[u\x1b7\x1b8",
        "\x1b]0;a title\x1b\\",
        "\x1b]8;;https://example.com/\x1b\\link\x1b]8;;\x1b\\",
        "\x1b[?25l\x1b[?25h\x1b[?2004h\x1b[?1000h\x1b[?1006h\x1b[6n\x1b[c\x1b[>c",
        "\x1b[1;23r\x1b[4h\x1b[4l\x1b(0qqq\x1b(B\x1b=\x1b>\x1b[5 q",
    ] {
        assert_eq!(passed(output), output);
    }
}

#[test]
fn what_has_a_terminal_type_hide_or_lie_is_left_out() {
    for output in [
        "\x05",                         // a word of the terminal's
        "\x1b[21t",                     // its title, typed
        "\x1b[8;1;1t",                  // a window of one cell
        "\x1b[2t",                      // no window
        "\x1b[5i",                      // all that follows to the printer
        "\x1bP17/79\x1b\\",             // what a function key types
        "\x1bPtmux;\x1b\x1b[21t\x1b\\", // past a multiplexer
        "\x1b_Ga=q;AAAA\x1b\\",         // pictures
        "\x1b^private\x1b\\",
        "\x1b]10;#000000\x1b\\", // black on black
        "\x1b]11;#000000\x07",
        "\x1b]4;7;#000000\x1b\\",
        "\x1b]50;tiny\x1b\\",
        "\x1b]52;c;?\x1b\\",                // what was copied, typed
        "\x1b[?3h",                         // another width
        "\x1b[?69h\x1b[1;2s".split_at(6).0, // margins at the sides
        "\x1b#8",                           // a screen of E
        "\x1b G",                           // answers without an escape
        "\x1b[1;1;1;1;24;80*y",             // what is on the screen, as a sum
        "\x1b[1;1;24;80$z",
        "\x1b[?1$p",
        "\x1b[>4;2m", // keys in another form
        "\x1b[>1u",
        "\x1b[?2026h", // nothing shown until further notice
        "\x1b[?6h",
        "\x1b]0;a\x01b\x1b\\".split_at(4).0, // unfinished
        "\x1b]0;title",
        "\x1b[12;",
        "\x1b",
    ] {
        assert_eq!(passed(output), "", "{:?}", output.escape_debug().to_string());
    }
}

#[test]
fn control_characters_of_the_upper_half_begin_nothing() {
    assert_eq!(passed("\u{9b}5i\u{90}x\u{9c}"), "5ix");
}

#[test]
fn sequence_without_end_takes_no_memory() {
    let mut filter = Filter::new(None);
    assert_eq!(filter.feed(b"\x1b]0;"), Passed::default());
    for _ in 0..1000 {
        assert_eq!(filter.feed(&[b'x'; 10_000]), Passed::default());
    }
    assert!(filter.feed(b"\x1b\\after").shown.ends_with("after"));
    for _ in 0..10_000 {
        filter.feed(b"\x1b[1m\x0e\x1b(0");
    }
    assert!(filter.plain(ROWS).len() + filter.own().len() <= 3 * STYLE_MAX_BYTES);
}

/// Pieces of which hostile output is made.
const PIECES: &[&str] = &[
    "text",
    "y",
    "\r",
    "\n",
    "\t",
    "\x08",
    "\x0b",
    "\x0e",
    "\x0f",
    "\x05",
    "日",
    "e\u{301}",
    "\u{200b}",
    "\x1b[24;1H[abcd] vnet: all is well",
    "\x1b[999;999H",
    "\x1b[999B",
    "\x1b[999E",
    "\x1b[24d",
    "\x1b[999e",
    "\x1bD",
    "\x1bE",
    "\x1bM",
    "\x1b7",
    "\x1b8",
    "\x1bc",
    "\x1b[!p",
    "\x1b[s",
    "\x1b[u",
    "\x1b[r",
    "\x1b[1;2r",
    "\x1b[20;24r",
    "\x1b[24;24r",
    "\x1b[0;0r",
    "\x1b[5;3r",
    "\x1b[?6h",
    "\x1b[?6l",
    "\x1b[J",
    "\x1b[1J",
    "\x1b[2J",
    "\x1b[3J",
    "\x1b[K",
    "\x1b[99L",
    "\x1b[99M",
    "\x1b[99S",
    "\x1b[99T",
    "\x1b[99P",
    "\x1b[99@",
    "\x1b[99X",
    "\x1b[99b",
    "\x1b[8m",
    "\x1b[7m",
    "\x1b[30;40m",
    "\x1b[38;5;0;48;5;0m",
    "\x1b[m",
    "\x1b[?25l",
    "\x1b[?7l",
    "\x1b[4h",
    "\x1b[?5h",
    "\x1b[?3h",
    "\x1b[?69h",
    "\x1b#8",
    "\x1b[5i",
    "\x1b]10;#000\x07",
    "\x1b]0;t",
    "\x1bP",
    "\x1b_",
    "\x1b\\",
    "\x1b[",
    "\x1b",
    "\x1b(0",
    "\x1b(B",
    "\x1b[?2026h",
    "\x1b[0;0H",
    "\x1b[0d",
    "\x1b[0G",
    "\x1b[0A",
    "\x1b[65535C",
    "\x1b[?1049h",
    "\x1b[?47h",
    "\x1b[?1047l",
    "\x1b[8;1;1t",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
];

/// xorshift64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(limit).unwrap()).unwrap()
    }

    fn output(&mut self) -> Vec<u8> {
        let mut output = Vec::new();
        for _ in 0..self.below(40) {
            match self.below(12) {
                0 => output.extend((0..self.below(6)).map(|_| self.below(256) as u8)),
                _ => output.extend(PIECES[self.below(PIECES.len())].bytes()),
            }
        }
        output
    }
}

#[test]
fn nothing_of_a_whole_screen_is_drawn_in_the_last_row() {
    for seed in 1..40 {
        let mut dice = Dice(seed);
        let mut filter = Filter::new(Some((ROWS, COLUMNS)));
        let mut terminal = terminal();
        for _ in 0..20 {
            let row = format!("[k7qx] vnet: {}", dice.below(10));
            if let Some(canvas) = filter.canvas() {
                canvas.set_row(&row);
            }
            let output = [b"\x1b[?1049h".as_slice(), &dice.output()].concat();
            for part in output.chunks(1 + dice.below(200)) {
                if let Some(canvas) = filter.canvas() {
                    canvas.set_row(&row);
                }
                let passed = filter.feed(part);
                terminal.process(passed.shown.as_bytes());
                if filter.canvas().is_some() {
                    let mut shown = String::new();
                    filter.canvas().unwrap().set_row(&row);
                    filter.canvas().unwrap().draw(&mut shown);
                    terminal.process(shown.as_bytes());
                    let last = terminal
                        .screen()
                        .rows(0, COLUMNS)
                        .nth(usize::from(ROWS) - 1)
                        .unwrap();
                    assert_eq!(
                        last.trim_end(),
                        row,
                        "seed {seed}: {:?}",
                        output.escape_ascii().to_string()
                    );
                }
            }
        }
    }
}

#[test]
fn question_is_seen_whatever_came_before() {
    const QUESTION: &str = "[k7qx] vnet: web asks for tcp 203.0.113.10:80 (a.example); [y]es until it stops, [o]nce, \
                            [n]o, [d]etails (or elsewhere: vnetctl approve bpvh846r)? ";
    for seed in 1..2000 {
        let mut dice = Dice(seed);
        let mut filter = Filter::new(Some((ROWS, COLUMNS)));
        let mut terminal = terminal();
        let mut output = Vec::new();
        for _ in 0..4 {
            output.extend(dice.output());
        }
        terminal.process(filter.feed(&output).shown.as_bytes());
        let told = || format!("seed {seed}: {:?}", output.escape_ascii().to_string());
        let shown = match filter.canvas() {
            Some(canvas) => canvas.cover(QUESTION).unwrap(),
            None => format!("\r\n{}{QUESTION}", filter.plain(ROWS)),
        };
        terminal.process(shown.as_bytes());
        let screen = terminal.screen();
        let rows: Vec<String> = screen.rows(0, COLUMNS).collect();
        let covers = filter.canvas().is_some();
        // Without the blanks at which rows are joined.
        let seen: String = rows.concat().replace(' ', "");
        assert!(
            seen.ends_with(&QUESTION.replace(' ', "")),
            "{}: {rows:#?}",
            told()
        );
        let (row, column) = screen.cursor_position();
        let cell = screen.cell(row, column.saturating_sub(2)).unwrap();
        assert_eq!(
            (cell.fgcolor(), cell.bgcolor(), cell.inverse()),
            (vt100::Color::Default, vt100::Color::Default, covers),
            "{}",
            told()
        );
        assert!(!screen.hide_cursor());
    }
}

#[test]
fn what_a_program_with_the_whole_screen_asks_is_answered_here() {
    let mut filter = Filter::new(Some((ROWS, COLUMNS)));
    let passed = filter.feed(b"\x1b[?1049h\x1b[3;5H\x1b[6n\x1b[5n\x1b[c\x1b[>c\x1b[21t");
    assert_eq!(passed.answers, "\x1b[3;5R\x1b[0n\x1b[?1;2c");
    assert!(!passed.shown.contains("\x1b[6n") && !passed.shown.contains("\x1b[c"));
}

#[test]
fn leaving_the_whole_screen_brings_the_other_back() {
    let mut filter = Filter::new(Some((ROWS, COLUMNS)));
    let mut terminal = terminal();
    for output in [
        "before \x1b[31mred",
        "\x1b[?1049h\x1b[?25l\x1b[1mover all",
        "\x1b[?1049l after",
    ] {
        terminal.process(filter.feed(output.as_bytes()).shown.as_bytes());
    }
    assert_eq!(terminal.screen().contents().trim_end(), "before red after");
    assert!(!terminal.screen().alternate_screen() && !terminal.screen().hide_cursor());
    assert_eq!(terminal.screen().fgcolor(), vt100::Color::Idx(1));

    filter.feed(b"\x1b[?1049h");
    assert!(filter.finish().ends_with("\x1b[?1049l\x1b[31m"));
}

#[test]
fn question_that_does_not_fit_is_not_shown() {
    let mut canvas = Canvas::new((4, 20));
    assert!(canvas.cover(&"x".repeat(4 * 19)).is_some());
    assert_eq!(canvas.cover(&"x".repeat(4 * 19 + 1)), None);
}

#[test]
fn another_size_is_drawn_anew_with_its_own_last_row() {
    let mut filter = Filter::new(Some((ROWS, COLUMNS)));
    filter.feed(b"\x1b[?1049hfirst\r\nsecond");
    filter.canvas().unwrap().set_row("own");
    let drawn = filter.resize(Some((10, 40)));
    let mut small = vt100::Parser::new(NonZeroU16::new(10).unwrap(), NonZeroU16::new(40).unwrap(), 0);
    small.process(drawn.as_bytes());
    let rows: Vec<String> = small.screen().rows(0, 40).collect();
    assert_eq!(
        (rows[0].as_str(), rows[1].as_str(), rows[9].trim_end()),
        ("first", "second", "own")
    );
}
