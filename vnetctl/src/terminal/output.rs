//! What of a command's output reaches the user's terminal. A terminal does much more than show text: it answers,
//! resizes itself, prints, sets keys, changes colours for good. With that a command could answer a question of
//! vnet's, cover it, or take it off the screen. So the output is read as the terminal would read it
//! (ECMA-48, xterm's "Control Sequences"), and what is known and harmless is passed on, in whole sequences; all
//! else is left out. Nothing that was begun can be open when vnet writes.
//!
//! A program that takes the whole screen (the alternate one) never writes to the terminal itself: its screen is a
//! [`Canvas`] that is a row less high than the terminal, and what is shown is drawn from that.

use std::fmt::Write as _;

use vte::{Params, Parser, Perform};

use super::canvas::Canvas;

/// The rows and columns of a terminal.
pub(crate) type Size = (u16, u16);

/// What was made of some output.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Passed {
    /// For the terminal.
    pub(crate) shown: String,
    /// For the command: what a terminal would have answered.
    pub(crate) answers: String,
}

/// Passes a command's output on.
pub(crate) struct Filter {
    parser: Parser,
    state: State,
}

/// Colours and the like that are set are remembered up to this; more are reset instead.
const STYLE_MAX_BYTES: usize = 512;

struct State {
    passed: Passed,
    /// The terminal's size, where a program that takes the whole screen is to leave a row.
    reserve: Option<Size>,
    canvas: Option<Canvas>,
    style: Style,
}

/// What is set on the terminal, outside of a canvas.
#[derive(Debug, Default)]
struct Style {
    /// Colours and attributes since they were last reset, as they were set.
    rendition: String,
    /// As it was set.
    margins: Option<String>,
    cursor_hidden: bool,
    wrap_off: bool,
    insert: bool,
    /// A character set other than ASCII, as it was chosen.
    charset: String,
    /// A link is open.
    link: bool,
    /// Anything of this was set, or could be by what was kept.
    touched: bool,
    /// The cursor may be above what was written.
    moved: bool,
}

impl Filter {
    /// For a terminal in which a row can be reserved, if its size is given.
    pub(crate) fn new(reserve: Option<Size>) -> Filter {
        Filter {
            parser: Parser::new(),
            state: State {
                passed: Passed::default(),
                reserve,
                canvas: None,
                style: Style::default(),
            },
        }
    }

    /// Takes output of the command's.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Passed {
        self.parser.advance(&mut self.state, bytes);
        if let Some(canvas) = &mut self.state.canvas {
            canvas.draw(&mut self.state.passed.shown);
        }
        std::mem::take(&mut self.state.passed)
    }

    /// The screen of a program that has taken it whole.
    pub(crate) fn canvas(&mut self) -> Option<&mut Canvas> {
        self.state.canvas.as_mut()
    }

    /// The terminal has another size.
    pub(crate) fn resize(&mut self, reserve: Option<Size>) -> String {
        // A screen whose row cannot be reserved any more keeps its size: nothing of it may pass by itself.
        if let Some(size) = reserve
            && let Some(canvas) = &mut self.state.canvas
        {
            canvas.resize(size);
        }
        self.state.reserve = reserve;
        match &mut self.state.canvas {
            Some(canvas) => canvas.redraw(),
            None => String::new(),
        }
    }

    /// Makes the terminal fit to be written to by vnet, wherever the command has left it.
    pub(crate) fn plain(&mut self, rows: u16) -> String {
        let style = &mut self.state.style;
        let mut shown = String::new();
        if style.touched {
            // What bringing the cursor back (DECRC) has brought with it is not known.
            shown.push_str("\x1b[0m\x0f\x1b(B\x1b)B\x1b[?7h");
        }
        if style.cursor_hidden {
            shown.push_str("\x1b[?25h");
        }
        if style.insert {
            shown.push_str("\x1b[4l");
        }
        if style.link {
            shown.push_str("\x1b]8;;\x1b\\");
        }
        if style.margins.is_some() {
            // In its region a line could scroll away at once.
            shown.push_str("\x1b[r");
        }
        if std::mem::take(&mut style.moved) || style.margins.is_some() {
            // Below all that it has drawn.
            let _ = write!(shown, "\x1b[{};1H\r\n", if rows == 0 { 999 } else { rows });
        }
        shown
    }

    /// Undoes [`plain`](Self::plain).
    pub(crate) fn own(&self) -> String {
        let style = &self.state.style;
        let mut shown = String::new();
        if let Some(margins) = &style.margins {
            let _ = write!(shown, "\x1b7{margins}\x1b8");
        }
        shown.push_str(&style.charset);
        if style.cursor_hidden {
            shown.push_str("\x1b[?25l");
        }
        if style.wrap_off {
            shown.push_str("\x1b[?7l");
        }
        if style.insert {
            shown.push_str("\x1b[4h");
        }
        shown.push_str(&style.rendition);
        shown
    }

    /// Leaves the whole screen, if the command has ended in it.
    pub(crate) fn finish(&mut self) -> String {
        if self.state.canvas.is_some() {
            self.state.leave("1049");
        }
        let mut shown = std::mem::take(&mut self.state.passed.shown);
        if self.state.style.margins.is_some() {
            shown.push_str("\x1b[r");
        }
        shown
    }
}

impl State {
    fn show(&mut self, text: &str) {
        match &mut self.canvas {
            Some(canvas) => canvas.feed(text),
            None => self.passed.shown.push_str(text),
        }
    }

    /// What has no place on a screen: titles, modes of the keyboard and the mouse.
    fn pass(&mut self, text: &str) {
        self.passed.shown.push_str(text);
    }

    fn enter(&mut self, mode: &str) {
        let Some(size) = self.reserve.filter(|_| self.canvas.is_none()) else {
            return;
        };
        let _ = write!(self.passed.shown, "\x1b[?{mode}h\x1b[r");
        let mut canvas = Canvas::new(size);
        self.passed.shown.push_str(&canvas.redraw());
        self.canvas = Some(canvas);
    }

    fn leave(&mut self, mode: &str) {
        let Some(mut canvas) = self.canvas.take() else {
            return;
        };
        canvas.draw(&mut self.passed.shown);
        self.style.moved = true;
        let shown = if self.style.cursor_hidden { "l" } else { "h" };
        let _ = write!(self.passed.shown, "\x1b[0m\x1b[?25{shown}\x1b[?{mode}l");
        self.passed.shown.push_str(&self.style.rendition);
        if let Some(margins) = &self.style.margins {
            let _ = write!(self.passed.shown, "\x1b7{margins}\x1b8");
        }
    }

    fn private_mode(&mut self, mode: u16, on: bool) {
        let text = format!("\x1b[?{mode}{}", if on { 'h' } else { 'l' });
        match mode {
            47 | 1047 | 1049 if self.reserve.is_some() || self.canvas.is_some() => {
                let mode = mode.to_string();
                if on { self.enter(&mode) } else { self.leave(&mode) }
            }
            47 | 1047 | 1048 | 1049 if self.canvas.is_none() => {
                self.style.moved = true;
                self.pass(&text);
            }
            // The keyboard, the mouse, the focus, pasting: the terminal's own, whatever is on the screen.
            1 | 12 | 66 | 1000 | 1002 | 1003 | 1004 | 1006 | 2004 => self.pass(&text),
            25 => {
                if self.canvas.is_none() {
                    self.style.cursor_hidden = !on;
                }
                self.show(&text);
            }
            7 if self.canvas.is_none() => {
                self.style.wrap_off = !on;
                self.show(&text);
            }
            // Counting lines from the region's first is of use within a screen only.
            6 if self.canvas.is_some() => self.show(&text),
            _ => {}
        }
    }

    fn rendition(&mut self, text: &str, params: &Params) {
        if self.canvas.is_none() {
            let resets = params.iter().next().is_none_or(|first| first == [0]);
            if resets {
                self.style.rendition.clear();
            }
            if !resets || params.len() > 1 {
                self.style.rendition.push_str(text);
            }
            if self.style.rendition.len() > STYLE_MAX_BYTES {
                self.style.rendition = "\x1b[0m".to_owned();
                return self.show("\x1b[0m");
            }
        }
        self.show(text);
    }

    /// What a terminal would tell of itself. On a canvas it is told here.
    fn ask(&mut self, text: &str, marks: &[u8], action: char, params: &Params) {
        let Some(canvas) = &mut self.canvas else {
            return self.pass(text);
        };
        match (action, first(params)) {
            _ if !marks.is_empty() => {}
            ('n', 5) => self.passed.answers.push_str("\x1b[0n"),
            ('n', 6) => {
                let (row, column) = canvas.cursor();
                let _ = write!(self.passed.answers, "\x1b[{};{}R", row + 1, column + 1);
            }
            // A VT100 with advanced video.
            ('c', 0) => self.passed.answers.push_str("\x1b[?1;2c"),
            _ => {}
        }
    }

    /// The terminal as it was (DECSTR, RIS). What the first of them leaves differs from one terminal to the next.
    fn reset(&mut self, text: &str) {
        if let Some(canvas) = &mut self.canvas {
            return canvas.feed("\x1b[0m\x1b[r\x1b[?6l\x1b[?25h");
        }
        if text == "\x1bc" {
            self.style = Style::default();
        }
        self.style.moved = true;
        self.pass(text);
    }
}

impl Perform for State {
    fn print(&mut self, character: char) {
        self.show(character.encode_utf8(&mut [0; 4]));
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            0x07 => self.pass("\x07"),
            0x08..=0x0d => self.show(char::from(byte).encode_utf8(&mut [0; 4])),
            0x0e | 0x0f if self.canvas.is_some() => {
                if let Some(canvas) = &mut self.canvas {
                    canvas.shift(byte == 0x0e);
                }
            }
            0x0e => {
                self.style.touched = true;
                self.style.charset.push('\x0e');
                self.keep_charset();
                self.pass("\x0e");
            }
            0x0f => {
                self.style.charset = self.style.charset.replace('\x0e', "");
                self.pass("\x0f");
            }
            // ENQ has some terminals type a word; the others do nothing, or what C1 does.
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, params: &Params, marks: &[u8], ignore: bool, action: char) {
        if ignore {
            return;
        }
        self.style.touched = true;
        let text = sequence(params, marks, action);
        match (marks, action) {
            (b"?", 'h' | 'l') => {
                for mode in params {
                    self.private_mode(mode[0], action == 'h');
                }
            }
            (b"", 'm') => self.rendition(&text, params),
            // Insertion, and what a line feed means.
            (b"", 'h' | 'l') => {
                if first(params) == 4 && self.canvas.is_none() {
                    self.style.insert = action == 'h';
                }
                if matches!(first(params), 4 | 20) && params.len() == 1 {
                    self.show(&text);
                }
            }
            (b"", 'r') => {
                if self.canvas.is_none() {
                    let whole = params.iter().all(|param| param[0] == 0);
                    self.style.margins = (!whole).then(|| text.clone());
                    self.style.moved = true;
                }
                self.show(&text);
            }
            (b"", 'c' | 'n') | (b">", 'c' | 'q') => self.ask(&text, marks, action, params),
            // Of reports and changes of the window, only that titles are kept and brought back.
            (b"", 't') if matches!(first(params), 22 | 23) => self.pass(&text),
            (b" ", 'q') => self.pass(&text),
            (b"!", 'p') => self.reset(&text),
            // Moving, erasing, inserting and deleting; tabs; keeping the place.
            (b"", '@'..='M' | 'P' | 'S' | 'T' | 'X' | 'Z' | '`' | 'a' | 'b' | 'd'..='g' | 's' | 'u') => {
                if self.canvas.is_none() && matches!(action, 'A' | 'F' | 'H' | 'L' | 'T' | 'd' | 'f' | 'u') {
                    self.style.moved = true;
                }
                self.show(&text);
            }
            _ => {}
        }
    }

    fn esc_dispatch(&mut self, marks: &[u8], ignore: bool, byte: u8) {
        if ignore {
            return;
        }
        self.style.touched = true;
        match (marks, byte) {
            (b"", b'7' | b'8' | b'D' | b'E' | b'H' | b'M') => {
                if self.canvas.is_none() && matches!(byte, b'8' | b'M') {
                    self.style.moved = true;
                }
                self.show(&format!("\x1b{}", char::from(byte)));
            }
            // The keypad.
            (b"", b'=' | b'>') => self.pass(&format!("\x1b{}", char::from(byte))),
            (b"", b'c') => self.reset("\x1bc"),
            ([set @ (b'(' | b')')], b'0' | b'A' | b'B') if self.canvas.is_none() => {
                let text = format!("\x1b{}{}", char::from(*set), char::from(byte));
                self.style.charset.push_str(&text);
                self.keep_charset();
                self.pass(&text);
            }
            ([b'(' | b')'], b'0' | b'B') => {
                if let Some(canvas) = &mut self.canvas {
                    canvas.line_drawing(marks[0], byte == b'0');
                }
            }
            _ => {}
        }
    }

    fn osc_dispatch(&mut self, parts: &[&[u8]], _bell: bool) {
        let Some(text) = parts
            .iter()
            .map(|part| std::str::from_utf8(part).ok())
            .collect::<Option<Vec<&str>>>()
        else {
            return;
        };
        // What could end the sequence, or be another.
        if text.iter().any(|part| part.chars().any(char::is_control)) {
            return;
        }
        match text.as_slice() {
            // Titles; where the shell is, and what is its prompt.
            ["0" | "1" | "2" | "7" | "133", ..] => {}
            // Colours can be asked for, or be as they were; not changed, or text could be made invisible.
            ["10" | "11" | "12", "?"] | ["4", _, "?"] if self.canvas.is_none() => {}
            ["104" | "110" | "111" | "112", ..] => {}
            // Links.
            ["8", _, target @ ..] if self.canvas.is_none() => {
                self.style.link = target.iter().any(|part| !part.is_empty());
            }
            // What is copied; not what was.
            ["52", _, data] if *data != "?" => {}
            _ => return,
        }
        self.pass(&format!("\x1b]{}\x1b\\", text.join(";")));
    }
}

impl State {
    /// Character sets are chosen by a few short sequences; whoever chooses without end starts over.
    fn keep_charset(&mut self) {
        if self.style.charset.len() > STYLE_MAX_BYTES {
            self.style.charset = "\x0f\x1b(B\x1b)B".to_owned();
        }
    }
}

/// The first parameter, 0 where there is none.
fn first(params: &Params) -> u16 {
    params
        .iter()
        .next()
        .and_then(|param| param.first().copied())
        .unwrap_or(0)
}

/// A control sequence as it was, written anew.
fn sequence(params: &Params, marks: &[u8], action: char) -> String {
    let mut text = "\x1b[".to_owned();
    let (private, between): (Vec<u8>, Vec<u8>) = marks.iter().partition(|mark| (0x3c..=0x3f).contains(*mark));
    text.extend(private.into_iter().map(char::from));
    // None at all is read as one that is zero.
    let none = params.len() == 1 && params.iter().all(|param| param == [0]);
    for (index, param) in params.iter().enumerate().filter(|_| !none) {
        if index > 0 {
            text.push(';');
        }
        for (index, part) in param.iter().enumerate() {
            if index > 0 {
                text.push(':');
            }
            let _ = write!(text, "{part}");
        }
    }
    text.extend(between.into_iter().map(char::from));
    text.push(action);
    text
}

#[cfg(test)]
mod tests;
